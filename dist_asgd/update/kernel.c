/* The ASGD update of a table of segments in one pass over memory. This is plain C without Python's or torch's headers;
 * cpu.py loads it through ctypes and checks every tensor whose address it passes.
 *
 * For parameters x, gradients g and averages ax at step t:
 *
 *   g  <- -g                                             if maximize
 *   g  <- g * unscale;  g <- g * clip                    if scaled
 *   g  <- fma(x, weight_decay, g)                        if weight_decay is not 0
 *   x  <- x * c;  x <- fma(g, -eta, x)                   c = 1 - lambd * eta, computed in double precision
 *   ax <- x if mu = 1 else ax + (x - ax) * mu            the copy is left out if unwritten
 *
 * The schedule (lambd, alpha, t0 and lr to eta and mu) is schedule.py's; rows of (c, -eta, mu, t) arrive here.
 *
 * The bits are those of torch's for-loop form (reference.py) on CPUs with AVX2 or AVX-512: an fma stands wherever ATen
 * fuses a multiply-add, and the compiler may contract nothing else (-ffp-contract=off).
 *
 * 16-bit arrays are converted in registers. With masters or stochastic rounding, only the results are rounded to 16
 * bits. Otherwise every operation rounds as torch's does. In a scaled addition torch rounds the product first in the
 * last numel % 32 elements of a tensor (the tail), and not in those before (the lanes).
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

#define ABI 5
#define INLINE static inline __attribute__((always_inline))
/* For arrays that vectors are read from: a vector that lies in two cache lines takes twice as long. */
#define LINED __attribute__((aligned(64)))

enum dtype { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum mode { PLAIN, MASTER, STOCHASTIC };
/* What loop() reads as g: floats that prepare() has left, or 16-bit gradients that it adds no or some decay to. */
enum source { PREPARED, RAW, DECAYED };
/* A block is 256 elements, a cache line 64 bytes. */
enum { BLOCK = 256, LINE = 64, MAX_THREADS = 256 };

/* Segment of segments.py; `first` is the offset of its first element in the whole parameter. */
typedef struct {
    void *param, *average, *master;
    int64_t numel, row, lanes, first, key;
} segment;

typedef struct {
    double c, minus_eta, mu, t;
} scalars;

/* _Call of cpu.py. `gradients` has one address for each segment. */
typedef struct {
    const segment *segments;
    const void *const *gradients;
    const scalars *rows;
    int64_t num_segments, num_threads;
    int64_t param, gradient, average, mode; /* of enum dtype and enum mode */
    int64_t maximize, scaled, streamed, unwritten; /* unwritten: averages are left alone while mu = 1 */
    double weight_decay, unscale, clip;
} call;

INLINE uint32_t bits_of(float x) { uint32_t b; memcpy(&b, &x, 4); return b; }
INLINE float of_bits(uint32_t b) { float x; memcpy(&x, &b, 4); return x; }
/* Chooses without a branch, so that the compiler vectorises the loops around it. */
INLINE uint32_t choose(int condition, uint32_t yes, uint32_t no) {
    uint32_t mask = -(uint32_t)(condition != 0);
    return (yes & mask) | (no & ~mask);
}

/* --- float32 and float64 -------------------------------------------------------------------------------------- */

/* g with its sign bit changed by `sign`: -g if that is the sign bit, g if it is 0. One loop does for both. */
INLINE float signed_float(float g, uint32_t sign) { return of_bits(bits_of(g) ^ sign); }
INLINE double signed_double(double g, uint64_t sign) {
    uint64_t b;
    memcpy(&b, &g, 8);
    b ^= sign;
    memcpy(&g, &b, 8);
    return g;
}

/* update_T() is the rule; choose_T() calls the copy of it that was compiled for the options of the call. */
#define WIDE(T, BITS, FMA)                                                                                             \
    INLINE void update_##T(T *restrict x, const T *restrict g, T *restrict ax, int64_t n, T c, T minus_eta, T mu,      \
                           T weight_decay, T unscale, T clip, BITS sign, const int scaled, const int decayed,          \
                           const int begun) {                                                                          \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            T gi = signed_##T(g[i], sign), xi = x[i];                                                                  \
            if (scaled) { gi *= unscale; gi *= clip; }                                                                 \
            if (decayed) gi = FMA(xi, weight_decay, gi);                                                               \
            xi *= c;                                                                                                   \
            xi = FMA(gi, minus_eta, xi);                                                                               \
            x[i] = xi;                                                                                                 \
            if (begun) { T d = xi - ax[i]; d *= mu; ax[i] += d; } else ax[i] = xi;                                     \
        }                                                                                                              \
    }                                                                                                                  \
    INLINE void choose_##T(const call *k, const scalars *s, T *x, const T *g, T *ax, int64_t n, const int begun) {     \
        T c = (T)s->c, e = (T)s->minus_eta, mu = (T)s->mu, w = (T)k->weight_decay, u = (T)k->unscale, l = (T)k->clip;  \
        BITS sign = k->maximize ? (BITS)1 << (8 * sizeof(T) - 1) : 0;                                                  \
        switch ((k->scaled != 0) | (w != 0) << 1) {                                                                    \
        case 0: update_##T(x, g, ax, n, c, e, mu, w, u, l, sign, 0, 0, begun); break;                                  \
        case 1: update_##T(x, g, ax, n, c, e, mu, w, u, l, sign, 1, 0, begun); break;                                  \
        case 2: update_##T(x, g, ax, n, c, e, mu, w, u, l, sign, 0, 1, begun); break;                                  \
        default: update_##T(x, g, ax, n, c, e, mu, w, u, l, sign, 1, 1, begun);                                        \
        }                                                                                                              \
    }
WIDE(float, uint32_t, __builtin_fmaf)
WIDE(double, uint64_t, __builtin_fma)

/* Writes whole cache lines past the caches: memory that is only written need not be fetched first. The lines come from
 * a buffer that is small enough for reading and writing to go on side by side. */
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
/* Uses the vector instructions of the loop that fills the buffer: SSE's among AVX's can take twice as long. */
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

/* Copies through `writer`, and the bytes before the first and after the last whole line as usual. */
INLINE void stream(void *to, const void *from, int64_t bytes, line_writer *writer) {
    int64_t head = -(uintptr_t)to & (LINE - 1);
    if (head > bytes) head = bytes;
    memcpy(to, from, (size_t)head);
    int64_t lines = (bytes - head) / LINE, done = head + lines * LINE;
    writer((char *)to + head, (const char *)from + head, lines);
    memcpy((char *)to + done, (const char *)from + done, (size_t)(bytes - done));
}

/* How many elements of `size` bytes to take so that the next block begins at a cache line. */
INLINE int64_t until_block(const void *at, int64_t size) {
    return BLOCK - (int64_t)((uintptr_t)at & (LINE - 1)) / size;
}

/* --- 16 bits: values are kept as floats; a float is "on the grid" if the 16-bit type has it ---------------------- */

/* Rounds to the nearest value on the grid. */

INLINE float bfloat16_grid(float x) {
    uint32_t b = bits_of(x), rounded = (b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000u;
    return of_bits(choose((b & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000u, rounded));
}

/* bfloat16_grid() of a sum or product of values on the grid and of factor() results, without its test for NaN. A NaN
 * among these has no bits below the grid, nor has a NaN that is computed from it, so rounding leaves it a NaN. */
INLINE float bfloat16_round(float x) {
    uint32_t b = bits_of(x);
    return of_bits((b + 0x7FFF + (b >> 16 & 1)) & 0xFFFF0000u);
}

/* A scalar as float; every NaN becomes the one on the grid. */
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
    /* Never through a denormal float, which some programs have flushed to zero: 2^-14 is added and taken away. */
    uint32_t small = bits_of(of_bits(0x38800000u | a << 13) - of_bits(0x38800000u));
    uint32_t finite = choose(a < 0x400u, small, (a << 13) + 0x38000000u);
    return of_bits(sign | choose(a >= 0x7C00u, 0x7F800000u | (a & 0x3FF) << 13, finite));
}

/* The 16 bits of x, which is on the grid of float16. */
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

/* mix() of rounding.py. */
INLINE uint32_t mix(uint32_t w) {
    w ^= w >> 16;
    w *= 0x7FEB352Du;
    w ^= w >> 15;
    w *= 0x846CA68Bu;
    return w ^ w >> 16;
}

typedef struct {
    float c, minus_eta, mu, weight_decay;
    uint32_t key, step_key;
    uint64_t first;
} narrow_scalars;

/* The float32 master of a float16 parameter; the parameter itself if it was written since the last step. */
INLINE float recall(float master, float param) {
    return of_bits(choose(float16_grid(master) == param, bits_of(master), bits_of(param)));
}

/* The float32 master of a bfloat16 parameter and its remainder; see masters.py. */
INLINE float join(uint16_t param, int16_t remainder) {
    return of_bits(((uint32_t)param << 16) + (uint32_t)(int32_t)remainder);
}

INLINE float master_of(uint16_t param, const void *master, int64_t i, const int half) {
    return half ? recall(((const float *)master)[i], float_of_half(param)) : join(param, ((const int16_t *)master)[i]);
}

/* The rule for n elements. All int arguments are constants where it is called, so each call is a loop of its own. */
INLINE void loop(const narrow_scalars s, uint16_t *restrict x, const void *restrict g, void *restrict ax,
                 void *restrict master, int64_t n, const int half, const int mode, const int wide_average,
                 const int begun, const int lanes, const int source) {
    for (int64_t i = 0; i < n; i++) {
#if defined(__GNUC__)
        /* A tail is at most 31 elements: its loops are kept from being vectorised, which would take a second of the
         * compiler's time. */
        if (mode == PLAIN && !lanes) __asm__ volatile("");
#endif
        float xi = mode == MASTER ? master_of(x[i], master, i, half) : wide(x[i], half);
        float gi = source == PREPARED ? ((const float *)g)[i] : wide(((const uint16_t *)g)[i], half);
        if (source == DECAYED && (mode != PLAIN || lanes)) {
            gi = __builtin_fmaf(xi, s.weight_decay, gi);
            if (mode == PLAIN) gi = rounded(gi, half);
        } else if (source == DECAYED) {
            gi = rounded(gi + rounded(xi * s.weight_decay, half), half);
        }
        if (mode == PLAIN) {
            xi = rounded(xi * s.c, half);
            xi = grid(lanes ? __builtin_fmaf(gi, s.minus_eta, xi) : xi + rounded(gi * s.minus_eta, half), half);
            x[i] = narrow(xi, half);
        } else {
            xi *= s.c;
            xi = __builtin_fmaf(gi, s.minus_eta, xi);
            uint32_t b = bits_of(xi), a = b & 0x7FFFFFFF;
            if (mode == STOCHASTIC) {
                uint64_t e = s.first + (uint64_t)i;
                uint32_t r = mix(mix((uint32_t)e ^ s.step_key) + (uint32_t)(e >> 32) * 0x9E3779B9u + s.key) >> 16;
                b = choose(a < 0x7F800000, b + r, choose(a > 0x7F800000, 0x7FC00000u, b));
                xi = of_bits(b & 0xFFFF0000u);
                x[i] = (uint16_t)(b >> 16);
            } else if (half) {
                ((float *)master)[i] = xi;
                x[i] = narrow(float16_grid(xi), 1);
            } else {
                b = choose(a > 0x7F800000, 0x7FC00000u, b);
                uint32_t h = (b + 0x8000u) >> 16;
                x[i] = (uint16_t)h;
                ((int16_t *)master)[i] = (int16_t)(b - (h << 16));
            }
        }
        if (wide_average) {
            float *f = (float *)ax + i;
            if (begun) { float d = xi - *f; d *= s.mu; *f += d; } else *f = xi;
        } else {
            uint16_t *h = (uint16_t *)ax + i;
            float y = mode == PLAIN ? xi : grid(xi, half);
            if (begun) {
                float axi = wide(*h, half), d = xi - axi;
                if (mode == PLAIN) d = rounded(rounded(d, half) * s.mu, half);
                else d *= s.mu;
                y = grid(axi + d, half);
            }
            *h = narrow(y, half);
        }
    }
}

#define BY_BEGUN(HALF, MODE, WIDE_AVERAGE, LANES, SOURCE)                                                              \
    if (begun) loop(s, x, g, ax, master, n, HALF, MODE, WIDE_AVERAGE, 1, LANES, SOURCE);                               \
    else loop(s, x, g, ax, master, n, HALF, MODE, WIDE_AVERAGE, 0, LANES, SOURCE);
#define BY_AVERAGE(HALF, MODE, LANES, SOURCE)                                                                          \
    if (k->average == FLOAT32) { BY_BEGUN(HALF, MODE, 1, LANES, SOURCE) }                                              \
    else { BY_BEGUN(HALF, MODE, 0, LANES, SOURCE) }
#define BY_SOURCE(MODE, LANES)                                                                                         \
    if (half || source == PREPARED) { BY_AVERAGE(half, MODE, LANES, PREPARED) }                                        \
    else if (source == RAW) { BY_AVERAGE(0, MODE, LANES, RAW) } else { BY_AVERAGE(0, MODE, LANES, DECAYED) }

/* Writes the gradient of one block to g as floats: negated, scaled and decayed, and on the grid unless there are
 * masters or stochastic rounding. */
INLINE void prepare(const call *k, const uint16_t *x, const void *master, const void *gradient, float *restrict g,
                    int64_t n, int64_t lanes, const int half) {
    uint32_t sign = k->maximize ? 0x80000000u : 0;
    int plain = k->mode == PLAIN, narrow_gradient = k->gradient != FLOAT32;
    float unscale = factor(k->unscale), clip = factor(k->clip), weight_decay = factor(k->weight_decay);
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
    if (weight_decay == 0) return;
    if (plain) {
        weight_decay = grid(weight_decay, half);
        for (int64_t i = 0; i < lanes; i++) g[i] = rounded(__builtin_fmaf(wide(x[i], half), weight_decay, g[i]), half);
        for (int64_t i = lanes; i < n; i++) g[i] = rounded(g[i] + rounded(wide(x[i], half) * weight_decay, half), half);
    } else if (k->mode == MASTER)
        for (int64_t i = 0; i < n; i++) g[i] = __builtin_fmaf(master_of(x[i], master, i, half), weight_decay, g[i]);
    else
        for (int64_t i = 0; i < n; i++) g[i] = __builtin_fmaf(wide(x[i], half), weight_decay, g[i]);
}

/* Calls loop() with the options of the call as constants. Only plain rounding tells lanes from the tail. */
INLINE void block(const call *k, narrow_scalars s, uint16_t *x, const void *g, void *ax, void *master, int64_t n,
                  const int begun, const int half, const int lanes, const int source) {
    if (k->mode == PLAIN) {
        if (lanes) { BY_SOURCE(PLAIN, 1) } else { BY_AVERAGE(half, PLAIN, 0, PREPARED) }
    } else if (k->mode == MASTER && lanes) { BY_SOURCE(MASTER, 0) }
    else if (!half && lanes && source == PREPARED) { BY_AVERAGE(0, STOCHASTIC, 0, PREPARED) }
}

/* --- averages of parameters that another optimizer updates ------------------------------------------------------- */

/* Elements of a parameter and of its average. */
typedef struct {
    const void *param;
    void *average;
    int64_t numel;
} pair;

/* _Means of cpu.py; the average's type is the parameter's, or float for 16 bits. */
typedef struct {
    const pair *pairs;
    int64_t num_pairs, num_threads, param;
    double weight;
} mean_call;

INLINE float same_float(float x) { return x; }
INLINE double same_double(double x) { return x; }
INLINE float of_bfloat16(uint16_t h) { return wide(h, 0); }

/* ax <- lerp(ax, x, weight) as ATen's vector loops have it (native/Lerp.h): one fma, from the nearer of the two. */
#define MEAN(NAME, FROM, T, WIDEN, FMA)                                                                                \
    INLINE void NAME(const FROM *restrict x, T *restrict ax, int64_t n, T factor, const int near_ax) {                 \
        for (int64_t i = 0; i < n; i++) {                                                                              \
            T xi = WIDEN(x[i]), a = ax[i], d = xi - a;                                                                 \
            ax[i] = FMA(factor, d, near_ax ? a : xi);                                                                  \
        }                                                                                                              \
    }
MEAN(mean_float32, float, float, same_float, __builtin_fmaf)
MEAN(mean_float64, double, double, same_double, __builtin_fma)
MEAN(mean_bfloat16, uint16_t, float, of_bfloat16, __builtin_fmaf)
MEAN(mean_float16, uint16_t, float, float_of_half, __builtin_fmaf)

/* --- threads ---------------------------------------------------------------------------------------------------- */

/* The elements start to stop, counted over all segments or pairs of a call, that one thread updates. */
typedef struct {
    const void *call;
    int64_t start, stop;
} thread_range;

/* `at` within the segment; inside of it, at the start of a block. */
INLINE int64_t cut(int64_t at, int64_t numel) {
    if (at <= 0) return 0;
    return at >= numel ? numel : at / BLOCK * BLOCK;
}

/* There is one copy for each set of vector instructions, chosen by what the processor has. (The attribute
 * target_clones("arch=...") asks for processor models instead, and misses later ones.) cpu.py uses the kernel only where
 * torch itself has AVX2 or AVX-512. */
#if defined(__x86_64__) && defined(__GNUC__)
#define ISA(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define WRITE_LINES write_lines_avx512
#include "kernel_isa.h"
#define ISA(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WRITE_LINES write_lines_avx2
#include "kernel_isa.h"
#else
#define ISA(name) name##_plain
#define TARGET
#define WRITE_LINES write_lines
#include "kernel_isa.h"
#endif

typedef void *work(void *);

/* The one of them that this processor has the instructions for. */
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTEST(name) (has_avx512() ? name##_avx512 : name##_avx2)
static int has_avx512(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#else
#define FASTEST(name) name##_plain
#endif

int64_t dist_asgd_abi(void) { return ABI; }

static int64_t threads_of(int64_t wanted) { return wanted < 1 ? 1 : wanted > MAX_THREADS ? MAX_THREADS : wanted; }

/* Calls `run` on each of `count` arguments of `size` bytes, the first in this thread. The other threads live for this
 * call only, so a fork at any other time is safe. An argument whose thread does not start is run here. */
static void run_all(work *run, void *arguments, size_t size, int64_t count) {
    pthread_t threads[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    for (int64_t t = 1; t < count; t++) started[t] = !pthread_create(&threads[t], 0, run, (char *)arguments + size * t);
    run(arguments);
    for (int64_t t = 1; t < count; t++) {
        if (started[t]) pthread_join(threads[t], 0);
        else run((char *)arguments + size * t);
    }
}

/* Lets threads share the `total` elements of `call`. */
static void run_ranges(work *run, const void *call, int64_t total, int64_t num_threads) {
    thread_range ranges[MAX_THREADS];
    int64_t count = threads_of(num_threads);
    for (int64_t t = 0; t < count; t++)
        ranges[t] = (thread_range){call, total / count * t, t == count - 1 ? total : total / count * (t + 1)};
    run_all(run, ranges, sizeof(thread_range), count);
}

/* Updates every segment and returns 0; returns -1 and changes nothing if a segment has no gradient. */
int64_t dist_asgd_update(const call *k) {
    int64_t total = 0;
    for (int64_t i = 0; i < k->num_segments; i++) {
        if (!k->gradients[i]) return -1;
        total += k->segments[i].numel;
    }
    run_ranges(FASTEST(update), k, total, k->num_threads);
    return 0;
}

/* Takes every parameter into its average. */
void dist_asgd_means(const mean_call *k) {
    int64_t total = 0;
    for (int64_t i = 0; i < k->num_pairs; i++) total += k->pairs[i].numel;
    run_ranges(FASTEST(means), k, total, k->num_threads);
}

/* The bytes that one thread copies past the caches. */
typedef struct {
    char *to;
    const char *from;
    int64_t bytes;
} copy_range;

static void *run_copy(void *at) {
    const copy_range *range = at;
    stream(range->to, range->from, range->bytes, write_lines);
#if defined(__SSE2__)
    _mm_sfence();
#endif
    return 0;
}

/* Copies bytes that are read much later, and not by this core (checkpoints). The two ranges must not overlap. */
void dist_asgd_copy(char *to, const char *from, int64_t bytes, int64_t num_threads) {
    copy_range ranges[MAX_THREADS];
    int64_t count = threads_of(num_threads), each = bytes / count / LINE * LINE;
    for (int64_t t = 0; t < count; t++)
        ranges[t] = (copy_range){to + each * t, from + each * t, t == count - 1 ? bytes - each * t : each};
    run_all(run_copy, ranges, sizeof(copy_range), count);
}
