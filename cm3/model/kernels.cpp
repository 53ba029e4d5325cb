// One decoding step of the transformer on a CPU, see cpu_step.py and kernels.py: one new token for each of a few rows.
//
// A step reads every weight once for a handful of products, so that only the rate of reading counts. Weights are
// fetched ahead of their use, which the processor does not do well by itself for rows this short, and all else happens
// between two products without a call from outside. Activations are float32 whatever the weights are.

#if !defined(__GNUC__) || defined(__clang__) || defined(__INTEL_COMPILER)
#error only GNU compilers: torch may bring another OpenMP than others do, and two of them can end a process
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum Kind : int64_t { FP32, BF16, INT8 };
enum Activation : int64_t { RELU, GELU, SWIGLU };

struct Matrix {
  const void* weight;   // outputs x width
  const float* scale;   // of int8: one for each output
  int64_t kind, outputs, width;
};

struct Layer {
  const float *attention_norm, *feed_forward_norm;              // null: LayerNorm without weight
  const float *q_weight, *q_bias, *k_weight, *k_bias;           // heads x head width; null: heads are not normed
  Matrix qkv, attention_out, up, feed_forward_out;
  void *keys, *values;                                          // row, slot, head, element
};

struct Step {
  const Layer* layers;
  const float* final_norm;
  const float* rotary;  // position, pair, (cosine, sine); null: no rotation
  int64_t num_layers, width, num_heads, groups, head_width, inner_width, activation, is_swin, cache_kind, row_stride;
  float epsilon;
};

namespace {

typedef float floats __attribute__((vector_size(64)));
typedef float four __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
constexpr int64_t LANES = 16;

template <typename T> inline T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline float sum(floats v) {  // by subscripts: whatever has an address is not kept in registers
  const four a = {v[0], v[1], v[2], v[3]}, b = {v[4], v[5], v[6], v[7]};
  const four c = {v[8], v[9], v[10], v[11]}, d = {v[12], v[13], v[14], v[15]};
  const four quarter = (a + c) + (b + d);
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

inline float widen(float v) { return v; }
inline float widen(uint16_t v) { return load<float>(&(const uint32_t&)(uint32_t(v) << 16)); }
inline void narrow(float v, float* to) { *to = v; }
inline void narrow(float v, uint16_t* to) {  // to the nearest, ties to even
  uint32_t bits = load<uint32_t>(&v);
  *to = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp by Cephes' polynomial, in a form that compilers vectorise; off by 2e-7 at most
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  float f = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = ((((1.9875691500e-4f * f + 1.3981999507e-3f) * f + 8.3334519073e-3f) * f + 4.1665795894e-2f) * f
             + 1.6666665459e-1f) * f + 5.0000001201e-1f;
  int32_t bits = (int32_t(n) + 127) << 23;
  return (p * f * f + f + 1.0f) * load<float>(&bits);
}

// ---- products ----
// A weight of 2 bytes or 1 is taken from its word of 4 by shifts: part k of 16 words holds every PARTS-th input, and
// activations are brought into the same order beforehand.

struct Fp32 {
  static constexpr int PARTS = 1;
  typedef float type;
  static floats part(words w, int) { return (floats)w; }
};
struct Bf16 {
  static constexpr int PARTS = 2;
  typedef uint16_t type;
  static floats part(words w, int k) { return (floats)(k ? w & 0xffff0000u : w << 16); }
};
struct Int8 {
  static constexpr int PARTS = 4;
  typedef int8_t type;
  static floats part(words w, int k) { return __builtin_convertvector((ints)(w << (24 - 8 * k)) >> 24, floats); }
};

template <int PARTS> void arrange(const float* x, float* to, int64_t width) {
  for (int64_t d = 0; d < width; d += LANES * PARTS)
    for (int64_t k = 0; k < PARTS; k++)
      for (int64_t i = 0; i < LANES; i++) to[d + k * LANES + i] = x[d + i * PARTS + k];
}

// R rows times U rows of weights, in registers. What is fetched: for one row of weights what stands some way behind it,
// for several the next ones, to the second cache.
template <typename W, int R, int U>
inline void tile(const float* x, const typename W::type* w, int64_t width, bool fetch, float* out, int64_t outputs) {
  const int64_t ahead = U == 1 ? 4096 : U * width * sizeof(typename W::type);
  floats sums[R * U];
#pragma GCC unroll 64
  for (int i = 0; i < R * U; i++) sums[i] = floats{};
  for (int64_t d = 0; d < width; d += LANES * W::PARTS) {
    if (fetch)
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) __builtin_prefetch((const char*)(w + u * width + d) + ahead, 0, U == 1 ? 3 : 2);
#pragma GCC unroll 8
    for (int k = 0; k < W::PARTS; k++) {
      floats wide[U];
#pragma GCC unroll 8
      for (int u = 0; u < U; u++) wide[u] = W::part(load<words>(w + u * width + d), k);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        floats part = load<floats>(x + r * width + d + k * LANES);
#pragma GCC unroll 8
        for (int u = 0; u < U; u++) sums[r * U + u] += wide[u] * part;
      }
    }
  }
#pragma GCC unroll 64
  for (int i = 0; i < R * U; i++) out[(i / U) * outputs + i % U] = sum(sums[i]);
}

template <typename W, int U>
inline void strip(const float* x, const typename W::type* w, int64_t rows, int64_t width, float* out, int64_t outputs) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) tile<W, 4, U>(x + r * width, w, width, r == 0, out + r * outputs, outputs);
  for (; r + 2 <= rows; r += 2) tile<W, 2, U>(x + r * width, w, width, r == 0, out + r * outputs, outputs);
  for (; r < rows; r++) tile<W, 1, U>(x + r * width, w, width, r == 0, out + r * outputs, outputs);
}

template <typename W> void few_rows(const Matrix& m, const float* x, int64_t rows, float* scratch, float* out) {
  const auto* w = (const typename W::type*)m.weight;
  if (W::PARTS > 1) {
#pragma omp for
    for (int64_t r = 0; r < rows; r++) arrange<W::PARTS>(x + r * m.width, scratch + r * m.width, m.width);
    x = scratch;
  }
  const int64_t together = rows < 4 ? 1 : 4;
#pragma omp for schedule(static)
  for (int64_t n = 0; n < m.outputs; n += together) {
    if (together == 4 && n + 4 <= m.outputs)
      strip<W, 4>(x, w + n * m.width, rows, m.width, out + n, m.outputs);
    else
      for (int64_t i = n; i < std::min(n + together, m.outputs); i++)
        strip<W, 1>(x, w + i * m.width, rows, m.width, out + i, m.outputs);
    if (m.scale)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t i = n; i < std::min(n + together, m.outputs); i++) out[r * m.outputs + i] *= m.scale[i];
  }
}

#ifdef __AMX_BF16__
constexpr int64_t SIDE = 16, DEPTH = 32;  // of a tile: rows, and 16-bit elements of each
constexpr int64_t FEWEST_TILED_ROWS = 5;

bool may_use_tiles() {
  static const bool may = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return may;
}

// Many rows in 16 bit: tiles of 16 outputs x 32 inputs as they lie in memory, times 32 inputs x 16 rows.
void tiled(const Matrix& m, const float* x, int64_t rows, float* scratch, float* out) {
  const auto* w = (const uint16_t*)m.weight;
  auto* turned = (uint32_t*)scratch;  // group of rows, pair of inputs, row: two numbers a word
  const int64_t row_groups = (rows + SIDE - 1) / SIDE, pairs = m.width / 2;
#pragma omp for
  for (int64_t g = 0; g < row_groups; g++)
    for (int64_t d = 0; d < m.width; d += DEPTH) {
      uint16_t block[SIDE][DEPTH] = {};
      for (int64_t r = 0; r < std::min(SIDE, rows - g * SIDE); r++)
        for (int64_t i = 0; i < DEPTH; i++) narrow(x[(g * SIDE + r) * m.width + d + i], &block[r][i]);
      for (int64_t p = 0; p < DEPTH / 2; p++)
        for (int64_t r = 0; r < SIDE; r++)
          turned[(g * pairs + d / 2 + p) * SIDE + r] = load<uint32_t>(&block[r][2 * p]);
    }
  alignas(64) uint8_t shape[64] = {1};
  for (int i = 0; i < 5; i++) {
    shape[16 + 2 * i] = 64;
    shape[48 + i] = SIDE;
  }
  _tile_loadconfig(shape);
#pragma omp for schedule(static)
  for (int64_t n = 0; n < m.outputs; n += 2 * SIDE)
    for (int64_t g = 0; g < row_groups; g++) {
      const uint16_t* left = w + n * m.width;
      const uint32_t* right = turned + g * SIDE * pairs;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t d = 0; d < m.width; d += DEPTH) {
        if (g == 0)
          for (int64_t i = 0; i < 2 * SIDE; i++) __builtin_prefetch(left + (2 * SIDE + i) * m.width + d, 0, 2);
        _tile_loadd(2, left + d, m.width * 2);
        _tile_loadd(3, left + SIDE * m.width + d, m.width * 2);
        _tile_loadd(4, right + d / 2 * SIDE, 64);
        _tile_dpbf16ps(0, 2, 4);
        _tile_dpbf16ps(1, 3, 4);
      }
      alignas(64) float found[2 * SIDE][SIDE];
      _tile_stored(0, found, 64);
      _tile_stored(1, found + SIDE, 64);
      for (int64_t r = 0; r < std::min(SIDE, rows - g * SIDE); r++)
        for (int64_t i = 0; i < 2 * SIDE; i++) out[(g * SIDE + r) * m.outputs + n + i] = found[i][r];
    }
  _tile_release();
}
#endif

void product(const Matrix& m, const float* x, int64_t rows, float* scratch, float* out) {
#ifdef __AMX_BF16__
  if (m.kind == BF16 && rows >= FEWEST_TILED_ROWS && m.outputs % (2 * SIDE) == 0 && may_use_tiles())
    return tiled(m, x, rows, scratch, out);
#endif
  if (m.kind == FP32) few_rows<Fp32>(m, x, rows, scratch, out);
  else if (m.kind == BF16) few_rows<Bf16>(m, x, rows, scratch, out);
  else few_rows<Int8>(m, x, rows, scratch, out);
}

// ---- all else ----

// RMSNorm with weight, or LayerNorm with or without.
void normalise(const float* x, const float* weight, const float* bias, bool is_rms, float epsilon, int64_t width,
               float* to) {
  float mean = 0, square = 0;
  if (!is_rms) {
#pragma omp simd reduction(+ : mean)
    for (int64_t d = 0; d < width; d++) mean += x[d];
    mean /= width;
  }
#pragma omp simd reduction(+ : square)
  for (int64_t d = 0; d < width; d++) square += (x[d] - mean) * (x[d] - mean);
  const float inverse = 1 / std::sqrt(square / width + epsilon);
  for (int64_t d = 0; d < width; d++)
    to[d] = (x[d] - mean) * inverse * (weight ? weight[d] : 1.0f) + (bias ? bias[d] : 0.0f);
}

void norm_rows(const Step& s, const float* weight, const float* x, int64_t rows, float* to) {
#pragma omp for
  for (int64_t r = 0; r < rows; r++)
    normalise(x + r * s.width, weight, nullptr, weight != nullptr, s.epsilon, s.width, to + r * s.width);
}

// A branch's output onto the residual stream, through its norm if that comes last.
void add(const Step& s, const float* weight, float* branch, int64_t rows, float* x) {
#pragma omp for
  for (int64_t r = 0; r < rows; r++) {
    float* from = branch + r * s.width;
    if (s.is_swin) normalise(from, weight, nullptr, weight != nullptr, s.epsilon, s.width, from);
    for (int64_t d = 0; d < s.width; d++) x[r * s.width + d] += from[d];
  }
}

void rotate(float* head, const float* table, int64_t width) {
  for (int64_t i = 0; i < width; i += 2) {
    const float a = head[i], b = head[i + 1];
    head[i] = a * table[i] - b * table[i + 1];
    head[i + 1] = a * table[i + 1] + b * table[i];
  }
}

// Norm and rotation of queries and keys, and the new keys and values into the cache.
template <typename C> void place(const Step& s, const Layer& layer, float* qkv, const int64_t* positions, int64_t rows) {
  const int64_t width = s.head_width, heads = s.num_heads + 2 * s.groups;
#pragma omp for
  for (int64_t r = 0; r < rows; r++) {
    const int64_t slot = r * s.row_stride + positions[r] * s.groups * width;
    for (int64_t h = 0; h < heads; h++) {
      float* head = qkv + (r * heads + h) * width;
      const int64_t key = h - s.num_heads, value = key - s.groups;
      if (value < 0) {
        const float *weight = key < 0 ? layer.q_weight + h * width : layer.k_weight + key * width;
        const float *bias = key < 0 ? layer.q_bias + h * width : layer.k_bias + key * width;
        if (layer.q_weight) normalise(head, weight, bias, false, s.epsilon, width, head);
        if (s.rotary) rotate(head, s.rotary + positions[r] * width, width);
      }
      if (key < 0) continue;
      C* to = value < 0 ? (C*)layer.keys + slot + key * width : (C*)layer.values + slot + value * width;
      for (int64_t i = 0; i < width; i++) narrow(head[i], to + i);
    }
  }
}

// Softmax of one query's products with the filled slots of its row, times their values. The cache is read in words like
// weights are, and the query is arranged for it; heads that fill no words are read number by number.
template <typename W>
void attend(const Step& s, const float* q, const typename W::type* keys, const typename W::type* values, int64_t slots,
            float* scores, float* out) {
  constexpr int64_t BLOCK = LANES * W::PARTS, MOST = 256 / LANES;
  const int64_t width = s.head_width, stride = s.groups * width, blocks = width / BLOCK;
  const bool is_whole = width % BLOCK == 0 && width <= 256;
  const float scale = 1 / std::sqrt(float(width));
  floats query[MOST], found[MOST];
  if (is_whole) arrange<W::PARTS>(q, (float*)query, width);
  float largest = -INFINITY, total = 0;
  for (int64_t t = 0; t < slots; t++) {
    const auto* key = keys + t * stride;
    float dot = 0;
    if (is_whole) {
      floats dots = {};
      for (int64_t b = 0; b < blocks; b++)
        for (int k = 0; k < W::PARTS; k++) dots += query[b * W::PARTS + k] * W::part(load<words>(key + b * BLOCK), k);
      dot = sum(dots);
    } else {
      for (int64_t i = 0; i < width; i++) dot += q[i] * widen(key[i]);
    }
    scores[t] = dot * scale;
    largest = std::max(largest, scores[t]);
  }
#pragma omp simd reduction(+ : total)
  for (int64_t t = 0; t < slots; t++) {
    scores[t] = exponential(scores[t] - largest);
    total += scores[t];
  }
  std::fill(found, found + MOST, floats{});
  std::fill(out, out + width, 0.0f);
  for (int64_t t = 0; t < slots; t++) {
    const auto* value = values + t * stride;
    if (is_whole)
      for (int64_t b = 0; b < blocks; b++)
        for (int k = 0; k < W::PARTS; k++)
          found[b * W::PARTS + k] += scores[t] * W::part(load<words>(value + b * BLOCK), k);
    else
      for (int64_t i = 0; i < width; i++) out[i] += scores[t] * widen(value[i]);
  }
  for (int64_t i = 0; i < width; i++) {
    if (is_whole) {
      const int64_t in_block = i % BLOCK, part = in_block % W::PARTS, lane = in_block / W::PARTS;
      out[i] = ((const float*)found)[i - in_block + part * LANES + lane];
    }
    out[i] /= total;
  }
}

template <typename W>
void attend_rows(const Step& s, const Layer& layer, const float* qkv, const int64_t* positions, int64_t rows,
                 int64_t slots, float* scores, float* out) {
  const int64_t width = s.head_width, heads = s.num_heads + 2 * s.groups;
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < rows * s.num_heads; i++) {
    const int64_t r = i / s.num_heads, h = i % s.num_heads;
    const int64_t first = r * s.row_stride + h / (s.num_heads / s.groups) * width;
    const auto *keys = (const typename W::type*)layer.keys, *values = (const typename W::type*)layer.values;
    attend<W>(s, qkv + (r * heads + h) * width, keys + first, values + first, positions[r] + 1, scores + i * slots,
              out + i * width);
  }
}

void activate(const Step& s, const float* up, int64_t rows, float* to) {
  const int64_t width = s.inner_width, block = 128, blocks = (width + block - 1) / block;
#pragma omp for
  for (int64_t i = 0; i < rows * blocks; i++) {
    const int64_t r = i / blocks, start = i % blocks * block, stop = std::min(start + block, width);
    const float *gate = up + r * width * (s.activation == SWIGLU ? 2 : 1), *value = gate + width;
    float* out = to + r * width;
    if (s.activation == SWIGLU)
      for (int64_t f = start; f < stop; f++) out[f] = gate[f] / (1 + exponential(-gate[f])) * value[f];
    else if (s.activation == RELU)
      for (int64_t f = start; f < stop; f++) out[f] = std::max(gate[f], 0.0f);
    else
      for (int64_t f = start; f < stop; f++) out[f] = 0.5f * gate[f] * (1 + std::erf(gate[f] * 0.70710678f));
  }
}

}  // namespace

// Rows of the residual stream `x` through all layers, and through the final norm into `normed`. `positions` are those of
// the new tokens. There is room in `wide` for the rows of qkv or up, in `inner` for those of attention or the inner
// width, in `arranged` for 16 more of these, in `scores` for rows x heads x slots. Returns the number of rows whose
// position is behind the last slot; then nothing was done.
extern "C" int64_t decode(const Step* step, int64_t rows, int64_t threads, const int64_t* positions, int64_t slots,
                          float* x, float* normed, float* wide, float* inner, float* arranged, float* scores) {
  const Step& s = *step;
  const int64_t outside = std::count_if(positions, positions + rows, [=](int64_t p) { return p < 0 || p >= slots; });
  if (outside) return outside;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t l = 0; l < s.num_layers; l++) {
      const Layer& layer = s.layers[l];
      const float* from = x;
      if (!s.is_swin) norm_rows(s, layer.attention_norm, x, rows, normed), from = normed;
      product(layer.qkv, from, rows, arranged, wide);
      if (s.cache_kind == FP32) {
        place<float>(s, layer, wide, positions, rows);
        attend_rows<Fp32>(s, layer, wide, positions, rows, slots, scores, inner);
      } else {
        place<uint16_t>(s, layer, wide, positions, rows);
        attend_rows<Bf16>(s, layer, wide, positions, rows, slots, scores, inner);
      }
      product(layer.attention_out, inner, rows, arranged, wide);
      add(s, layer.attention_norm, wide, rows, x);
      if (!s.is_swin) norm_rows(s, layer.feed_forward_norm, x, rows, normed);
      product(layer.up, from, rows, arranged, wide);
      activate(s, wide, rows, inner);
      product(layer.feed_forward_out, inner, rows, arranged, wide);
      add(s, layer.feed_forward_norm, wide, rows, x);
    }
    norm_rows(s, s.final_norm, x, rows, normed);
  }
  return 0;
}

// Rows up to which a product is made here, by the kind of its weights: with more, libraries are faster.
extern "C" int64_t most_rows([[maybe_unused]] int64_t kind) {
#ifdef __AMX_BF16__
  if (kind == BF16 && may_use_tiles()) return 32;
#endif
  return 16;
}

// `out = x @ weight.T` in float32.
extern "C" void multiply(const Matrix* matrix, int64_t rows, int64_t threads, const float* x, float* arranged,
                         float* out) {
#pragma omp parallel num_threads(threads)
  product(*matrix, x, rows, arranged, out);
}
