"""Retrieval: dual encoders, a memory of documents with an index over their vectors, and which documents to keep."""
