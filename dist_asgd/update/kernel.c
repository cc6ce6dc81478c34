/* The ASGD update of a table of segments in one pass over memory. Plain C, no Python and no torch headers; loaded
 * through ctypes by cpu.py, which checks every pointer before it gets here.
 *
 * The arithmetic is that of torch's for-loop form on CPUs with AVX2 or AVX-512, to the bit: where ATen fuses a
 * multiply-add, an fma is written, and the compiler is told to contract nothing else (-ffp-contract=off).
 *
 *   g  <- -g;  g <- g * unscale;  g <- g * clip          each where asked for
 *   g  <- fma(x, weight_decay, g)                        where it is not 0
 *   x  <- x * c;  x <- fma(g, -eta, x)                   c = 1 - lambd * eta, from double precision
 *   ax <- x if mu = 1 else ax + (x - ax) * mu
 *
 * 16-bit arrays are converted in registers. With masters, and where the result is rounded stochastically, nothing
 * else is rounded to 16 bits. Without, every operation is as torch does,
 * and torch rounds the product of a scaled addition first in the last numel % 32 elements of a tensor ("tail"), but
 * not in those before ("lanes").
 */
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#define ABI 3
#define INLINE static inline __attribute__((always_inline))

enum dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum mode { PLAIN, MASTER, STOCHASTIC };
enum source { PREPARED, RAW, DECAYED };
enum { BLOCK = 256, LINE = 64, MAX_THREADS = 256 }; /* elements, bytes */

typedef struct {
    void *param, *average, *master;
    int64_t numel, row, lanes, first, key;
} segment;

typedef struct {
    double c, minus_eta, mu, step;
} scalars;

typedef struct {
    const segment *segments;
    const void *const *gradients;
    const scalars *rows;
    int64_t num_segments, num_threads;
    int64_t param, gradient, average, mode; /* of enum dtype and enum mode */
    int64_t maximize, scaled, streamed;
    double weight_decay, unscale, clip;
} call;

INLINE uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
INLINE float of_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
/* A choice without a branch, in loops that are to be vectorised. */
INLINE uint32_t choose(int condition, uint32_t yes, uint32_t no) {
    uint32_t mask = -(uint32_t)(condition != 0);
    return (yes & mask) | (no & ~mask);
}

/* --- float32 and float64 -------------------------------------------------------------------------------------- */

#define WIDE(T, FMA)                                                                                                   \
    INLINE void update_##T(T *restrict p, const T *restrict g, T *restrict ax, int64_t n, T c, T minus_eta, T mu,      \
                           T decay, T unscale, T clip, const int maximize, const int scaled, const int decays,         \
                           const int begun) {                                                                          \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            T grad = maximize ? -g[i] : g[i], x = p[i];                                                                \
            if (scaled) { grad *= unscale; grad *= clip; }                                                             \
            if (decays) grad = FMA(x, decay, grad);                                                                    \
            x *= c;                                                                                                    \
            x = FMA(grad, minus_eta, x);                                                                               \
            p[i] = x;                                                                                                  \
            if (begun) { T d = x - ax[i]; d *= mu; ax[i] += d; } else ax[i] = x;                                       \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void choose_##T(const call *k, const scalars *s, T *p, const T *g, T *ax, int64_t n, const int begun) {     \
        T c = (T)s->c, e = (T)s->minus_eta, mu = (T)s->mu, w = (T)k->weight_decay, u = (T)k->unscale, l = (T)k->clip;  \
        switch ((k->maximize != 0) | (k->scaled != 0) << 1 | (w != 0) << 2) {                                          \
        case 0: update_##T(p, g, ax, n, c, e, mu, w, u, l, 0, 0, 0, begun); break;                                     \
        case 1: update_##T(p, g, ax, n, c, e, mu, w, u, l, 1, 0, 0, begun); break;                                     \
        case 2: update_##T(p, g, ax, n, c, e, mu, w, u, l, 0, 1, 0, begun); break;                                     \
        case 3: update_##T(p, g, ax, n, c, e, mu, w, u, l, 1, 1, 0, begun); break;                                     \
        case 4: update_##T(p, g, ax, n, c, e, mu, w, u, l, 0, 0, 1, begun); break;                                     \
        case 5: update_##T(p, g, ax, n, c, e, mu, w, u, l, 1, 0, 1, begun); break;                                     \
        case 6: update_##T(p, g, ax, n, c, e, mu, w, u, l, 0, 1, 1, begun); break;                                     \
        default: update_##T(p, g, ax, n, c, e, mu, w, u, l, 1, 1, 1, begun);                                           \
        }                                                                                                              \
    }
WIDE(float, __builtin_fmaf)
WIDE(double, __builtin_fma)

/* Past the caches, on the way to memory: what is written and not read need not be fetched first. Whole lines at a time,
 * from a buffer that is small enough for reading and writing to go on side by side. */
typedef void line_writer(void *to, const void *from, int64_t num_lines);

#if defined(__SSE2__)
static __attribute__((noinline)) void write_lines(void *to, const void *from, int64_t num_lines) {
    for (int64_t i = 0; i < 4 * num_lines; i++)
        _mm_stream_si128((__m128i *)to + i, _mm_loadu_si128((const __m128i *)from + i));
}
#else
static void write_lines(void *to, const void *from, int64_t num_lines) { memcpy(to, from, (size_t)num_lines * LINE); }
#endif
#if defined(__x86_64__) && defined(__GNUC__)
/* In the instructions of the loop before it: SSE's among AVX's can take twice as long. */
__attribute__((noinline, target("avx2"))) static void write_lines_avx2(void *to, const void *from, int64_t num_lines) {
    for (int64_t i = 0; i < 2 * num_lines; i++)
        _mm256_stream_si256((__m256i *)to + i, _mm256_loadu_si256((const __m256i *)from + i));
}
__attribute__((noinline, target("avx512f"))) static void write_lines_avx512(void *to, const void *from,
                                                                            int64_t num_lines) {
    for (int64_t i = 0; i < num_lines; i++)
        _mm512_stream_si512((__m512i *)to + i, _mm512_loadu_si512((const char *)from + LINE * i));
}
#endif

INLINE void stream(void *to, const void *from, int64_t bytes, line_writer *writer) {
    int64_t head = -(uintptr_t)to & (LINE - 1);
    if (head > bytes) head = bytes;
    memcpy(to, from, (size_t)head);
    int64_t lines = (bytes - head) / LINE, done = head + lines * LINE;
    writer((char *)to + head, (const char *)from + head, lines);
    memcpy((char *)to + done, (const char *)from + done, (size_t)(bytes - done));
}

/* So many elements of an array until the next block begins, which is then at a line. */
INLINE int64_t until_block(const void *at, int64_t size) {
    return BLOCK - (int64_t)((uintptr_t)at & (LINE - 1)) / size;
}

#define WIDE_SEGMENT(T)                                                                                                \
    INLINE void segment_##T(const call *k, const segment *seg, const void *gradient, int64_t from, int64_t to,         \
                            line_writer *writer) {                                                                     \
        const scalars *s = k->rows + seg->row;                                                                         \
        T *p = (T *)seg->param + from, *ax = (T *)seg->average + from;                                                 \
        const T *g = (const T *)gradient + from;                                                                       \
        int64_t n = to - from;                                                                                         \
        if (s->mu != 1) choose_##T(k, s, p, g, ax, n, 1);                                                              \
        else if (!k->streamed) choose_##T(k, s, p, g, ax, n, 0);                                                       \
        else {                                                                                                         \
            T block[BLOCK];                                                                                            \
            for (int64_t i = 0, m; i < n; i += m) {                                                                    \
                m = until_block(ax + i, sizeof(T));                                                                    \
                if (m > n - i) m = n - i;                                                                              \
                choose_##T(k, s, p + i, g + i, block, m, 0);                                                           \
                stream(ax + i, block, m * (int64_t)sizeof(T), writer);                                                 \
            }                                                                                                          \
        }                                                                                                              \
    }
WIDE_SEGMENT(float)
WIDE_SEGMENT(double)

/* --- 16 bits: values on the grid of the narrow type, held as floats --------------------------------------------- */

INLINE float bfloat16_grid(float x) {
    uint32_t b = bits_of(x), rounded = (b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000u;
    return of_bits(choose((b & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000u, rounded));
}

/* Of a result of values on the grid and of factors. A NaN among those has no bits below the grid, nor has what comes of
 * it, so that rounding leaves it a NaN. */
INLINE float bfloat16_round(float x) {
    uint32_t b = bits_of(x);
    return of_bits((b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000u);
}

INLINE float factor(double x) { return x != x ? of_bits(0x7FC00000u) : (float)x; }

INLINE float float16_grid(float x) {
    uint32_t b = bits_of(x), sign = b & 0x80000000u, a = b & 0x7FFFFFFF;
    uint32_t normal = (a + 0xFFF + (a >> 13 & 1)) & ~0x1FFFu;
    uint32_t small = bits_of(of_bits(a) + 0.5f - 0.5f); /* below 2^-14 the grid is 2^-24, the spacing of 0.5 */
    uint32_t r = choose(a < 0x38800000, small, normal);
    r = choose(r > 0x477FE000, 0x7F800000u, r);
    return of_bits(sign | choose(a > 0x7F800000, 0x7FC00000u, r));
}

INLINE float float_of_half(uint16_t h) {
    uint32_t a = h & 0x7FFFu, sign = (uint32_t)(h & 0x8000u) << 16;
    float scaled = of_bits(a << 13) * of_bits(0x77800000u); /* 2^112 moves the exponent's bias */
    return of_bits(sign | choose(a >= 0x7C00u, 0x7F800000u | (a & 0x3FF) << 13, bits_of(scaled)));
}

/* x lies on the grid already. */
INLINE uint16_t half_of_grid(float x) {
    uint32_t b = bits_of(x), a = b & 0x7FFFFFFF, sign = b >> 16 & 0x8000;
    uint32_t normal = (a - 0x38000000u) >> 13;
    uint32_t small = (uint32_t)(int32_t)(of_bits(choose(a < 0x38800000, a, 0)) * 16777216.0f);
    uint32_t h = choose(a < 0x38800000, small, normal);
    h = choose(a >= 0x7F800000, choose(a > 0x7F800000, 0x7E00u, 0x7C00u), h);
    return (uint16_t)(sign | h);
}

INLINE float grid(float x, const int half) { return half ? float16_grid(x) : bfloat16_grid(x); }
INLINE float rounded(float x, const int half) { return half ? float16_grid(x) : bfloat16_round(x); }
INLINE float wide(uint16_t h, const int half) { return half ? float_of_half(h) : of_bits((uint32_t)h << 16); }
INLINE uint16_t narrow(float x, const int half) { return half ? half_of_grid(x) : (uint16_t)(bits_of(x) >> 16); }

INLINE uint32_t mix(uint32_t w) {
    w ^= w >> 16;
    w *= 0x7FEB352Du;
    w ^= w >> 15;
    w *= 0x846CA68Bu;
    return w ^ w >> 16;
}

typedef struct {
    float c, minus_eta, mu, decay;
    uint32_t key, step_key;
    uint64_t first;
} narrow_scalars;

/* The master of float16, or the parameter where somebody has written it since. */
INLINE float recall(float master, float param) {
    return of_bits(choose(float16_grid(master) == param, bits_of(master), bits_of(param)));
}

INLINE float join(uint16_t param, int16_t remainder) {
    return of_bits(((uint32_t)param << 16) + (uint32_t)(int32_t)remainder);
}

INLINE float master_of(uint16_t p, const void *master, int64_t i, const int half) {
    return half ? recall(((const float *)master)[i], float_of_half(p)) : join(p, ((const int16_t *)master)[i]);
}

/* g: as prepare() left it, or the 16-bit gradient itself. */
INLINE void loop(const narrow_scalars s, uint16_t *restrict p, const void *restrict g, void *restrict ax,
                 void *restrict master, int64_t n, const int half, const int mode, const int wide_average,
                 const int begun, const int lanes, const int source) {
    for (int64_t i = 0; i < n; i++) {
        float x = mode == MASTER ? master_of(p[i], master, i, half) : wide(p[i], half);
        float grad = source == PREPARED ? ((const float *)g)[i] : wide(((const uint16_t *)g)[i], half);
        if (source == DECAYED && mode != PLAIN) grad = __builtin_fmaf(x, s.decay, grad);
        else if (source == DECAYED)
            grad = rounded(lanes ? __builtin_fmaf(x, s.decay, grad) : grad + rounded(x * s.decay, half), half);
        if (mode == PLAIN) {
            x = rounded(x * s.c, half);
            x = grid(lanes ? __builtin_fmaf(grad, s.minus_eta, x) : x + rounded(grad * s.minus_eta, half), half);
            p[i] = narrow(x, half);
        } else {
            x *= s.c;
            x = __builtin_fmaf(grad, s.minus_eta, x);
            uint32_t b = bits_of(x), a = b & 0x7FFFFFFF;
            if (mode == STOCHASTIC) {
                uint64_t e = s.first + (uint64_t)i;
                uint32_t r = mix(mix((uint32_t)e ^ s.step_key) + (uint32_t)(e >> 32) * 0x9E3779B9u + s.key) >> 16;
                b = choose(a < 0x7F800000, b + r, choose(a > 0x7F800000, 0x7FC00000u, b));
                x = of_bits(b & 0xFFFF0000u);
                p[i] = (uint16_t)(b >> 16);
            } else if (half) {
                ((float *)master)[i] = x;
                p[i] = narrow(float16_grid(x), 1);
            } else {
                b = choose(a > 0x7F800000, 0x7FC00000u, b);
                uint32_t h = (b + 0x8000u) >> 16;
                p[i] = (uint16_t)h;
                ((int16_t *)master)[i] = (int16_t)(b - (h << 16));
            }
        }
        if (wide_average) {
            float *f = (float *)ax + i;
            if (begun) { float d = x - *f; d *= s.mu; *f += d; } else *f = x;
        } else {
            uint16_t *h = (uint16_t *)ax + i;
            float y = mode == PLAIN ? x : grid(x, half);
            if (begun) {
                float old = wide(*h, half), d = x - old;
                if (mode == PLAIN) d = rounded(rounded(d, half) * s.mu, half);
                else d *= s.mu;
                y = grid(old + d, half);
            }
            *h = narrow(y, half);
        }
    }
}

#define BY_BEGUN(HALF, MODE, WIDE_AVERAGE, LANES, SOURCE)                                                              \
    if (begun) loop(s, p, g, ax, master, n, HALF, MODE, WIDE_AVERAGE, 1, LANES, SOURCE);                               \
    else loop(s, p, g, ax, master, n, HALF, MODE, WIDE_AVERAGE, 0, LANES, SOURCE);
#define BY_AVERAGE(HALF, MODE, LANES, SOURCE)                                                                          \
    if (k->average == FLOAT32) { BY_BEGUN(HALF, MODE, 1, LANES, SOURCE) } else { BY_BEGUN(HALF, MODE, 0, LANES, SOURCE) }
#define BY_SOURCE(MODE, LANES)                                                                                         \
    if (half || source == PREPARED) { BY_AVERAGE(half, MODE, LANES, PREPARED) }                                        \
    else if (source == RAW) { BY_AVERAGE(0, MODE, LANES, RAW) } else { BY_AVERAGE(0, MODE, LANES, DECAYED) }

/* The gradient of one block as floats: negated, scaled and decayed. Returns with it in g. */
INLINE void prepare(const call *k, const uint16_t *p, const void *master, const void *gradient, float *restrict g,
                    int64_t n, int64_t lanes, const int half) {
    uint32_t sign = k->maximize ? 0x80000000u : 0;
    int plain = k->mode == PLAIN, narrow_gradient = k->gradient != FLOAT32;
    float unscale = factor(k->unscale), clip = factor(k->clip), decay = factor(k->weight_decay);
    if (narrow_gradient)
        for (int64_t i = 0; i < n; i++) g[i] = of_bits(bits_of(wide(((const uint16_t *)gradient)[i], half)) ^ sign);
    else
        for (int64_t i = 0; i < n; i++) g[i] = of_bits(bits_of(((const float *)gradient)[i]) ^ sign);
    if (k->scaled && narrow_gradient && plain)
        for (int64_t i = 0; i < n; i++) g[i] = rounded(rounded(g[i] * unscale, half) * clip, half);
    else if (k->scaled)
        for (int64_t i = 0; i < n; i++) { g[i] *= unscale; g[i] *= clip; }
    if (plain && !narrow_gradient)
        for (int64_t i = 0; i < n; i++) g[i] = grid(g[i], half);
    if (decay == 0) return;
    if (plain) {
        decay = grid(decay, half);
        for (int64_t i = 0; i < lanes; i++) g[i] = rounded(__builtin_fmaf(wide(p[i], half), decay, g[i]), half);
        for (int64_t i = lanes; i < n; i++) g[i] = rounded(g[i] + rounded(wide(p[i], half) * decay, half), half);
    } else if (k->mode == MASTER)
        for (int64_t i = 0; i < n; i++) g[i] = __builtin_fmaf(master_of(p[i], master, i, half), decay, g[i]);
    else
        for (int64_t i = 0; i < n; i++) g[i] = __builtin_fmaf(wide(p[i], half), decay, g[i]);
}

INLINE void block(const call *k, narrow_scalars s, uint16_t *p, const void *g, void *ax, void *master, int64_t n,
                  const int begun, const int half, const int lanes, const int source) {
    if (k->mode == PLAIN) {
        if (lanes) { BY_SOURCE(PLAIN, 1) } else { BY_AVERAGE(half, PLAIN, 0, PREPARED) }
    } else if (k->mode == MASTER) { BY_SOURCE(MASTER, 0) }
    else if (!half) { BY_AVERAGE(0, STOCHASTIC, 0, PREPARED) }
}

INLINE void segment_narrow(const call *k, const segment *seg, const void *gradient, int64_t from, int64_t to,
                           const int half, line_writer *writer) {
    const scalars *row = k->rows + seg->row;
    int64_t grad_size = k->gradient == FLOAT32 ? 4 : 2, average_size = k->average == FLOAT32 ? 4 : 2;
    int64_t master_size = half ? 4 : 2;
    int begun = row->mu != 1;
    narrow_scalars s = {factor(row->c), factor(row->minus_eta), factor(row->mu), factor(k->weight_decay),
                        (uint32_t)seg->key, 0, 0};
    /* torch hands the factor of a scaled addition to its 16-bit vector loops in 16 bits. */
    if (k->mode == PLAIN) s.minus_eta = grid(s.minus_eta, half), s.decay = grid(s.decay, half);
    int source = factor(k->weight_decay) == 0 ? RAW : DECAYED;
    int simple = !half && k->gradient != FLOAT32 && !k->maximize && !k->scaled && k->mode != STOCHASTIC;
    s.step_key = mix(s.key ^ mix((uint32_t)(uint64_t)row->step));
    int streamed = k->streamed && !begun;
    float g[BLOCK], averages[BLOCK];
    for (int64_t i = from, n; i < to; i += n) {
        char *average = (char *)seg->average + i * average_size, *ax = streamed ? (char *)averages : average;
        n = until_block(average, average_size);
        if (n > to - i) n = to - i;
        int64_t lanes = seg->lanes - i < 0 ? 0 : seg->lanes - i > n ? n : seg->lanes - i;
        uint16_t *p = (uint16_t *)seg->param + i;
        char *master = seg->master ? (char *)seg->master + i * master_size : 0;
        const char *raw = (const char *)gradient + i * grad_size;
        s.first = (uint64_t)(seg->first + i);
        if (simple && (k->mode == MASTER || lanes == n)) {
            block(k, s, p, raw, ax, master, n, begun, half, 1, source);
        } else {
            prepare(k, p, master, raw, g, n, lanes, half);
            if (k->mode != PLAIN) lanes = n;
            block(k, s, p, g, ax, master, lanes, begun, half, 1, PREPARED);
            block(k, s, p + lanes, g + lanes, ax + lanes * average_size, master, n - lanes, begun, half, 0, PREPARED);
        }
        if (streamed) stream(average, averages, n * average_size, writer);
    }
}

/* --- threads ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const call *call;
    int64_t start, stop;
} part;

INLINE int64_t cut(int64_t at, int64_t numel) {
    if (at <= 0) return 0;
    return at >= numel ? numel : at / BLOCK * BLOCK;
}

/* Elements start to stop, counted over all segments; cuts inside of a segment fall on blocks. */
INLINE void update_part(const part *range, line_writer *writer) {
    const call *k = range->call;
    int64_t offset = 0;
    for (int64_t i = 0; i < k->num_segments; i++) {
        const segment *seg = k->segments + i;
        int64_t from = cut(range->start - offset, seg->numel), to = cut(range->stop - offset, seg->numel);
        offset += seg->numel;
        if (from >= to) continue;
        switch (k->param) {
        case FLOAT32: segment_float(k, seg, k->gradients[i], from, to, writer); break;
        case FLOAT64: segment_double(k, seg, k->gradients[i], from, to, writer); break;
        case BFLOAT16: segment_narrow(k, seg, k->gradients[i], from, to, 0, writer); break;
        default: segment_narrow(k, seg, k->gradients[i], from, to, 1, writer);
        }
    }
#if defined(__SSE2__)
    if (k->streamed) _mm_sfence();
#endif
}

/* One copy for each set of vector instructions; the processor decides. (Attributes like target_clones("arch=...") ask
 * for processor models instead, and miss later ones.) */
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) static void *part_avx512(void *range) {
    update_part(range, write_lines_avx512);
    return 0;
}
__attribute__((target("avx2,fma"))) static void *part_avx2(void *range) {
    update_part(range, write_lines_avx2);
    return 0;
}
#endif
static void *part_plain(void *range) {
    update_part(range, write_lines);
    return 0;
}

static void *(*fastest_part(void))(void *) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("fma")) {
        if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl"))
            return part_avx512;
        if (__builtin_cpu_supports("avx2")) return part_avx2;
    }
#endif
    return part_plain;
}

int64_t dist_asgd_abi(void) { return ABI; }

static int64_t threads_of(int64_t wanted) { return wanted < 1 ? 1 : wanted > MAX_THREADS ? MAX_THREADS : wanted; }

/* Run `count` parts of `size` bytes each, the first in this thread. The other threads live for this call only, so a
 * fork at any other time is safe. */
static void run_all(void *(*run)(void *), void *parts, size_t size, int64_t count) {
    pthread_t threads[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    for (int64_t t = 1; t < count; t++) started[t] = !pthread_create(&threads[t], 0, run, (char *)parts + size * t);
    run(parts);
    for (int64_t t = 1; t < count; t++) {
        if (started[t]) pthread_join(threads[t], 0);
        else run((char *)parts + size * t);
    }
}

/* Update every segment; returns 0 when it is done, and -1, with nothing changed, where a segment has no gradient. */
int64_t dist_asgd_update(const call *k) {
    part parts[MAX_THREADS];
    int64_t total = 0, count = threads_of(k->num_threads);
    for (int64_t i = 0; i < k->num_segments; i++) {
        if (!k->gradients[i]) return -1;
        total += k->segments[i].numel;
    }
    for (int64_t t = 0; t < count; t++)
        parts[t] = (part){k, total / count * t, t == count - 1 ? total : total / count * (t + 1)};
    run_all(fastest_part(), parts, sizeof(part), count);
    return 0;
}

/* Bytes to copy past the caches. */
typedef struct {
    char *to;
    const char *from;
    int64_t bytes;
} stretch;

static void *copy_stretch(void *at) {
    const stretch *s = at;
    stream(s->to, s->from, s->bytes, write_lines);
#if defined(__SSE2__)
    _mm_sfence();
#endif
    return 0;
}

/* For what is read much later, and not by this core. The two ranges must not overlap. */
void dist_asgd_copy(char *to, const char *from, int64_t bytes, int64_t num_threads) {
    stretch stretches[MAX_THREADS];
    int64_t count = threads_of(num_threads), each = bytes / count / LINE * LINE;
    for (int64_t t = 0; t < count; t++)
        stretches[t] = (stretch){to + each * t, from + each * t, t == count - 1 ? bytes - each * t : each};
    run_all(copy_stretch, stretches, sizeof(stretch), count);
}
