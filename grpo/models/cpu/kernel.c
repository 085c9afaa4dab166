/* The main operations of decoding, on a CPU: see `kernel.py`. */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined __AVX512F__
#define LANES 16
#define TILE 12 /* rows whose sums fit into registers together, with WIDE columns each */
#elif defined __AVX__
#define LANES 8
#define TILE 6
#else
#define LANES 4
#define TILE 6
#endif
#define WIDE (2 * LANES)
#define INLINE static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

INLINE vector load(const float *from) { return *(const unaligned *)from; }
INLINE void store(float *to, vector x) { *(unaligned *)to = x; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- Products: rows times packed weights, with WIDE outputs side by side. --- */

typedef struct {
    const float *x, *weight, *start;
    float *y;
    int64_t apart, start_apart, inputs, outputs; /* apart: floats from one row to the next */
} rows;

/* Computes WIDE columns of the product of `count` rows; with `fetch`, prefetches the weights of the
 * next columns. */
INLINE void columns(rows of, int64_t row, int64_t column, int count, int fetch) {
    const float *x = of.x + row * of.apart, *weight = of.weight + column * of.inputs;
    const float *next = weight + WIDE * of.inputs;
    vector sum[TILE][2];
    UNROLLED for (int r = 0; r < count; r++) UNROLLED for (int v = 0; v < 2; v++) {
        const float *from = of.start + (row + r) * of.start_apart + column + v * LANES;
        sum[r][v] = of.start ? load(from) : (vector){0};
    }
    for (int64_t i = 0; i < of.inputs; i++) {
        vector first = load(weight + i * WIDE), second = load(weight + i * WIDE + LANES);
        if (fetch) {
            __builtin_prefetch(next + i * WIDE, 0, 2);
            __builtin_prefetch(next + i * WIDE + LANES, 0, 2);
        }
        UNROLLED for (int r = 0; r < count; r++) {
            sum[r][0] += x[r * of.apart + i] * first;
            sum[r][1] += x[r * of.apart + i] * second;
        }
    }
    UNROLLED for (int r = 0; r < count; r++) UNROLLED for (int v = 0; v < 2; v++)
        store(of.y + (row + r) * of.outputs + column + v * LANES, sum[r][v]);
}

int64_t wide(void) { return WIDE; }

/* Computes y [T, O] = start + x [T, I] times weight, which is packed as [O / WIDE, I, WIDE]; O is a
 * multiple of WIDE. start is [T, O], or [O] with start_apart = 0, or null. */
void product(float *y, const float *x, int64_t apart, const float *weight, const float *start,
             int64_t start_apart, int64_t count, int64_t inputs, int64_t outputs, int threads) {
    rows of = {x, weight, start, y, apart, start_apart, inputs, outputs};
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t column = 0; column < outputs; column += WIDE) {
        int64_t row = 0;
        for (; row + TILE <= count; row += TILE) columns(of, row, column, TILE, row == 0);
        switch (count - row) { /* constants for the compiler, so that sums stay in registers */
#define REST(n) case n: columns(of, row, column, n, row == 0); break;
        REST(1) REST(2) REST(3) REST(4) REST(5)
#if TILE > 6
        REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#endif
        }
    }
}

#include "kernel_bf16.h"

/* --- Operations between products. --- */

/* Returns e^x for x <= 0, with an error of up to 2 units in the last place (Cephes' expf). */
INLINE float exponential(float x) {
    x = x > -87.0f ? x : -87.0f;
    const float magic = 12582912.0f; /* 1.5 * 2^23: rounds x to an integer in its last bits */
    float shifted = x * 1.44269504f + magic, power = shifted - magic, factor;
    float r = x - power * 0.693359375f + power * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000u;
    memcpy(&factor, &bits, sizeof factor);
    return y * factor;
}

/* Computes y [T, D] = x / rms(x) * weight (1910.07467). */
void norm(float *y, const float *x, const float *weight, int64_t count, int64_t width,
          float epsilon, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < count; t++) {
        const float *from = x + t * width;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += from[i] * from[i];
        float factor = 1.0f / sqrtf(squares / width + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < width; i++) y[t * width + i] = from[i] * factor * weight[i];
    }
}

/* Computes y [T, F] = silu(gate) * up (2002.05202) from gate and up side by side in x [T, 2 F]. */
void gate(float *y, const float *x, int64_t count, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t t = 0; t < count; t++) {
        const float *gates = x + 2 * t * width, *ups = gates + width;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float e = exponential(-fabsf(gates[i]));
            y[t * width + i] = gates[i] * ups[i] * (gates[i] < 0 ? e : 1.0f) / (1.0f + e);
        }
    }
}

/* --- Attention of a new token of each row: its keys are its prompt's and its completion's. --- */

/* Contiguous keys and values, and the weights that each of several queries gives them. All queries
 * that share a block of them read it while it is in the cache nearest to the core. */
typedef struct {
    const float *keys, *values;
    float *weights;
    int64_t count, between; /* between: floats from one query's weights to the next one's */
} piece;

/* Returns query . key for LANES keys in order. Beyond `count`, it repeats the last key. */
INLINE vector scores(const float *query, const float *keys, int64_t count, int parts) {
    vector sum[LANES];
    const float *key[LANES];
    UNROLLED for (int i = 0; i < LANES; i++) {
        key[i] = keys + least(i, count - 1) * parts * LANES;
        sum[i] = load(query) * load(key[i]);
    }
    for (int p = 1; p < parts; p++) {
        vector q = load(query + p * LANES);
        UNROLLED for (int i = 0; i < LANES; i++) sum[i] += q * load(key[i] + p * LANES);
    }
    /* Adds up lanes: each step halves the number of vectors, until one has all sums. */
    lanes lane;
    UNROLLED for (int i = 0; i < LANES; i++) lane[i] = i;
    UNROLLED for (int s = LANES / 2; s > 0; s /= 2) {
        lanes second = ((lane & s) != 0) & LANES, here = lane + second, there = (lane ^ s) + second;
        UNROLLED for (int i = 0; i < s; i++) {
            vector a = sum[i], b = sum[i + s];
            sum[i] = __builtin_shuffle(a, b, here) + __builtin_shuffle(a, b, there);
        }
    }
    return sum[0];
}

/* Writes the scores of all keys; up to LANES - 1 more numbers than there are keys. */
INLINE void score(piece x, const float *queries, int64_t repeats, int parts) {
    for (int64_t n = 0; n < x.count; n += LANES)
        for (int64_t r = 0; r < repeats; r++)
            store(x.weights + r * x.between + n,
                  scores(queries + r * parts * LANES, x.keys + n * parts * LANES, x.count - n, parts));
}

INLINE void softmax(float *weights, int64_t count, float scale) {
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t n = 0; n < count; n++) most = weights[n] > most ? weights[n] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < count; n++) {
        weights[n] = exponential((weights[n] - most) * scale);
        sum += weights[n];
    }
#pragma omp simd
    for (int64_t n = 0; n < count; n++) weights[n] /= sum;
}

INLINE void add(piece x, float *out, int64_t repeats, int parts) {
    for (int64_t n = 0; n < x.count; n += LANES)
        for (int64_t r = 0; r < repeats; r++) {
            float *to = out + r * parts * LANES;
            vector sum[parts];
            UNROLLED for (int p = 0; p < parts; p++) sum[p] = load(to + p * LANES);
            for (int64_t i = n; i < least(n + LANES, x.count); i++)
                UNROLLED for (int p = 0; p < parts; p++)
                    sum[p] += x.weights[r * x.between + i] * load(x.values + (i * parts + p) * LANES);
            UNROLLED for (int p = 0; p < parts; p++) store(to + p * LANES, sum[p]);
        }
}

/* Computes the attention of a row's queries that share a key-value head. */
INLINE void attend_head(piece prompt, piece own, const float *queries, float *out, int64_t repeats,
                        float scale, int parts) {
    score(prompt, queries, repeats, parts);
    score(own, queries, repeats, parts);
    for (int64_t r = 0; r < repeats; r++)
        softmax(prompt.weights + r * prompt.between, prompt.count + own.count, scale);
    memset(out, 0, repeats * parts * LANES * sizeof(float));
    add(prompt, out, repeats, parts);
    add(own, out, repeats, parts);
}

/* Computes the attention of a new token of each row, and stores its key and value.
 * Shapes: out [N, H, d]; queries [N, H, d], whose rows are `apart` floats apart; new_keys,
 * new_values [N, K, d], whose rows are `new_apart` floats apart; own_* [N, K, longest, d], where
 * they are stored at `written`; prompt_* [B, K, prompt_longest, d]; prompt_of [N], lengths [B];
 * scratch [threads, H / K, prompt_longest + longest + 16]. d is a multiple of 16. A token attends
 * to the last `window` tokens, itself included. */
void attend(float *out, const float *queries, int64_t apart, const float *new_keys,
            const float *new_values, int64_t new_apart, float *own_keys, float *own_values,
            const float *prompt_keys, const float *prompt_values, const int64_t *prompt_of,
            const int64_t *lengths, float *scratch, int64_t rows, int64_t kv_heads, int64_t repeats,
            int64_t width, int64_t longest, int64_t prompt_longest, int64_t written, int64_t window,
            float scale, int threads) {
    const int64_t between = prompt_longest + longest + 16;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < rows * kv_heads; task++) {
        int64_t n = task / kv_heads, k = task % kv_heads, b = prompt_of[n];
        const float *asking = queries + n * apart + k * repeats * width;
        float *keys = own_keys + task * longest * width;
        float *values = own_values + task * longest * width;
        int64_t added = n * new_apart + k * width;
        memcpy(keys + written * width, new_keys + added, width * sizeof(float));
        memcpy(values + written * width, new_values + added, width * sizeof(float));

        int64_t unseen = lengths[b] + written + 1 - window;
        int64_t first = least(unseen > 0 ? unseen : 0, lengths[b]);
        int64_t own_first = unseen > lengths[b] ? unseen - lengths[b] : 0;
        int64_t behind = ((b * kv_heads + k) * prompt_longest + first) * width;
        float *weights = scratch + omp_get_thread_num() * repeats * between;
        piece prompt = {prompt_keys + behind, prompt_values + behind, weights, lengths[b] - first,
                        between};
        piece own = {keys + own_first * width, values + own_first * width, weights + prompt.count,
                     written + 1 - own_first, between};
        float *to = out + task * repeats * width;
        switch (width / LANES) { /* the usual widths, as constants for the compiler */
        case 64 / LANES: attend_head(prompt, own, asking, to, repeats, scale, 64 / LANES); break;
        case 128 / LANES: attend_head(prompt, own, asking, to, repeats, scale, 128 / LANES); break;
        default: attend_head(prompt, own, asking, to, repeats, scale, width / LANES);
        }
    }
}
