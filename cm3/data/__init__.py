"""Documents from files to packed batches of token ids."""
