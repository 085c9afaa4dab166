/* Products with factors in bf16 and sums in fp32, on processors that multiply bf16; part of
 * kernel.c. */
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

/* Rounds fp32 [count] to bf16, to the nearest, ties to even. NaN stays NaN. */
INLINE uint16_t round_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;
    return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

#ifdef __AVX512BF16__
int has_bf16(void) { return 1; }

typedef struct {
    const uint16_t *x, *weight;
    const float *start;
    float *y;
    int64_t start_apart, inputs, outputs;
} bf16_rows;

/* Computes WIDE columns of the product of `count` rows; pairs of inputs are multiplied together. */
INLINE void bf16_columns(bf16_rows of, int64_t row, int64_t column, int count, int fetch) {
    const uint16_t *x = of.x + row * of.inputs, *weight = of.weight + column * of.inputs;
    const uint16_t *next = weight + WIDE * of.inputs;
    __m512 sum[TILE][2];
    UNROLLED for (int r = 0; r < count; r++) UNROLLED for (int v = 0; v < 2; v++) {
        const float *from = of.start + (row + r) * of.start_apart + column + v * LANES;
        sum[r][v] = of.start ? _mm512_loadu_ps(from) : _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < of.inputs; i += 2) {
        const uint16_t *at = weight + i * WIDE;
        __m512bh first = (__m512bh)_mm512_loadu_si512(at);
        __m512bh second = (__m512bh)_mm512_loadu_si512(at + 2 * LANES);
        if (fetch) {
            __builtin_prefetch(next + i * WIDE, 0, 2);
            __builtin_prefetch(next + i * WIDE + 2 * LANES, 0, 2);
        }
        UNROLLED for (int r = 0; r < count; r++) {
            int32_t pair;
            memcpy(&pair, x + r * of.inputs + i, sizeof pair);
            __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, first);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, second);
        }
    }
    UNROLLED for (int r = 0; r < count; r++) UNROLLED for (int v = 0; v < 2; v++)
        _mm512_storeu_ps(of.y + (row + r) * of.outputs + column + v * LANES, sum[r][v]);
}

/* Computes the same as `product` from x [T, I] and weights in bf16, the latter packed as
 * [O / WIDE, I / 2, WIDE, 2]; I is even. */
void product_bf16(float *y, const uint16_t *x, const uint16_t *weight, const float *start,
                  int64_t start_apart, int64_t count, int64_t inputs, int64_t outputs,
                  int threads) {
    bf16_rows of = {x, weight, start, y, start_apart, inputs, outputs};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < outputs; column += WIDE) {
        int64_t row = 0;
        for (; row + TILE <= count; row += TILE) bf16_columns(of, row, column, TILE, row == 0);
        switch (count - row) {
#define REST_BF16(n) case n: bf16_columns(of, row, column, n, row == 0); break;
        REST_BF16(1) REST_BF16(2) REST_BF16(3) REST_BF16(4) REST_BF16(5) REST_BF16(6)
        REST_BF16(7) REST_BF16(8) REST_BF16(9) REST_BF16(10) REST_BF16(11)
        }
    }
}

/* Packs x [2 T, O] in bf16 as [O / WIDE, T, WIDE, 2]: pairs of tokens, block by block. */
INLINE void pack_pairs(uint32_t *packed, const uint16_t *x, int64_t apart, int64_t tokens,
                       int64_t outputs, int threads) {
    const int64_t pairs = (tokens + 1) / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < outputs; column += WIDE)
        for (int64_t t = 0; t < pairs; t++) {
            const uint16_t *even = x + 2 * t * apart + column, *odd = even + apart;
            uint32_t *to = packed + column * pairs + t * WIDE;
            if (2 * t + 1 < tokens)
                for (int64_t o = 0; o < WIDE; o++) to[o] = even[o] | (uint32_t)odd[o] << 16;
            else
                for (int64_t o = 0; o < WIDE; o++) to[o] = even[o];
        }
}

/* Adds `count` rows of a block of a' b to `sum`, whose rows are `apart` numbers apart. */
INLINE void add_outer(float *sums, const uint32_t *a, const uint32_t *b, int64_t pairs,
                      int64_t apart, int count) {
    __m512 sum[TILE][2];
    UNROLLED for (int r = 0; r < count; r++) UNROLLED for (int v = 0; v < 2; v++)
        sum[r][v] = _mm512_loadu_ps(sums + r * apart + v * LANES);
    for (int64_t t = 0; t < pairs; t++) {
        __m512bh first = (__m512bh)_mm512_loadu_si512(b + t * WIDE);
        __m512bh second = (__m512bh)_mm512_loadu_si512(b + t * WIDE + LANES);
        UNROLLED for (int r = 0; r < count; r++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(a[t * WIDE + r]);
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, first);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, second);
        }
    }
    UNROLLED for (int r = 0; r < count; r++) UNROLLED for (int v = 0; v < 2; v++)
        _mm512_storeu_ps(sums + r * apart + v * LANES, sum[r][v]);
}

#define TOKENS_AT_ONCE 512 /* so that a block's pairs stay in the caches near to the core */

/* Adds a' b to the fp32 gradient [O, I] of a weight, from a [T, O] and b [T, I] in bf16; O and I are
 * multiples of WIDE. scratch: (O + I) * TOKENS_AT_ONCE numbers in bf16. */
void accumulate_bf16(float *gradient, const uint16_t *a, int64_t a_apart, const uint16_t *b,
                     int64_t b_apart, uint32_t *scratch, int64_t tokens, int64_t outputs,
                     int64_t inputs, int threads) {
    const int by_outputs = outputs >= inputs; /* the longer side is divided among the threads */
    const int64_t longer = by_outputs ? outputs : inputs, shorter = outputs + inputs - longer;
    for (int64_t from = 0; from < tokens; from += TOKENS_AT_ONCE) {
        const int64_t count = least(TOKENS_AT_ONCE, tokens - from), pairs = (count + 1) / 2;
        uint32_t *packed_a = scratch, *packed_b = scratch + outputs * pairs;
        pack_pairs(packed_a, a + from * a_apart, a_apart, count, outputs, threads);
        pack_pairs(packed_b, b + from * b_apart, b_apart, count, inputs, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int64_t along = 0; along < longer; along += WIDE)
            for (int64_t across = 0; across < shorter; across += WIDE) {
                const int64_t o = by_outputs ? along : across, i = by_outputs ? across : along;
                float *to = gradient + o * inputs + i;
                const uint32_t *rows = packed_a + o * pairs, *columns = packed_b + i * pairs;
                add_outer(to, rows, columns, pairs, inputs, 12);
                add_outer(to + 12 * inputs, rows + 12, columns, pairs, inputs, 12);
                add_outer(to + 24 * inputs, rows + 24, columns, pairs, inputs, 8);
            }
    }
}
#else
int has_bf16(void) { return 0; }
void product_bf16(void) {}
void accumulate_bf16(void) {}
#endif

/* Packs a weight [O, I] in fp32 (wide_source) or bf16, of which an output's inputs are contiguous
 * and outputs are `apart` numbers apart, as [O / WIDE, I / 2, WIDE, 2] in bf16. */
void pack_bf16(uint16_t *packed, const void *weight, int wide_source, int64_t apart,
               int64_t inputs, int64_t outputs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < outputs; column += WIDE)
        for (int64_t i = 0; i < inputs; i += 2)
            for (int64_t o = 0; o < WIDE; o++)
                for (int64_t j = 0; j < 2; j++) {
                    int64_t from = (column + o) * apart + i + j;
                    packed[column * inputs + i * WIDE + 2 * o + j] =
                        wide_source ? round_bf16(((const float *)weight)[from])
                                    : ((const uint16_t *)weight)[from];
                }
}
