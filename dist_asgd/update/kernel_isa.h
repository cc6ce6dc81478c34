/* What is compiled once for each set of vector instructions. kernel.c includes this file with ISA(name), which makes a
 * name of its own, TARGET, the attribute that asks for the instructions, and WRITE_LINES.
 *
 * Every function with loops stands apart: the compiler takes four times as long over one that holds all of them.
 */
#define APART TARGET static __attribute__((noinline))

#define WIDE_LOOPS(T)                                                                                                  \
    APART void ISA(begun_##T)(const call *k, const scalars *s, T *x, const T *g, T *ax, int64_t n) {                   \
        choose_##T(k, s, x, g, ax, n, 1);                                                                              \
    }                                                                                                                  \
    APART void ISA(first_##T)(const call *k, const scalars *s, T *x, const T *g, T *ax, int64_t n) {                   \
        choose_##T(k, s, x, g, ax, n, 0);                                                                              \
    }                                                                                                                  \
    TARGET static void ISA(segment_##T)(const call *k, const segment *seg, const void *gradient, int64_t from,         \
                                        int64_t to) {                                                                  \
        const scalars *s = k->rows + seg->row;                                                                         \
        T *x = (T *)seg->param + from, *ax = (T *)seg->average + from;                                                 \
        const T *g = (const T *)gradient + from;                                                                       \
        int64_t n = to - from;                                                                                         \
        if (s->mu != 1) ISA(begun_##T)(k, s, x, g, ax, n);                                                             \
        else if (!k->streamed && !k->unwritten) ISA(first_##T)(k, s, x, g, ax, n);                                     \
        else {                                                                                                         \
            T block[BLOCK] LINED;                                                                                        \
            for (int64_t i = 0, m; i < n; i += m) {                                                                    \
                m = until_block(ax + i, sizeof(T));                                                                    \
                if (m > n - i) m = n - i;                                                                              \
                ISA(first_##T)(k, s, x + i, g + i, block, m);                                                          \
                if (!k->unwritten) stream(ax + i, block, m * (int64_t)sizeof(T), WRITE_LINES);                         \
            }                                                                                                          \
        }                                                                                                              \
    }
WIDE_LOOPS(float)
WIDE_LOOPS(double)
#undef WIDE_LOOPS

#define NARROW_LOOPS(NAME, HALF, LANES, SOURCE)                                                                        \
    APART void ISA(NAME)(const call *k, const narrow_scalars *s, uint16_t *x, const void *g, void *ax, void *master,   \
                         int64_t n, int begun) {                                                                       \
        block(k, *s, x, g, ax, master, n, begun, HALF, LANES, SOURCE);                                                 \
    }
NARROW_LOOPS(bfloat16_raw, 0, 1, RAW)
NARROW_LOOPS(bfloat16_decayed, 0, 1, DECAYED)
NARROW_LOOPS(bfloat16_lanes, 0, 1, PREPARED)
NARROW_LOOPS(float16_lanes, 1, 1, PREPARED)
NARROW_LOOPS(bfloat16_tail, 0, 0, PREPARED)
NARROW_LOOPS(float16_tail, 1, 0, PREPARED)
#undef NARROW_LOOPS

#define PREPARE(NAME, HALF)                                                                                            \
    APART void ISA(NAME)(const call *k, const uint16_t *x, const void *master, const void *gradient, float *g,         \
                         int64_t n, int64_t lanes) {                                                                   \
        prepare(k, x, master, gradient, g, n, lanes, HALF);                                                            \
    }
PREPARE(prepare_bfloat16, 0)
PREPARE(prepare_float16, 1)
#undef PREPARE

TARGET static void ISA(segment_narrow)(const call *k, const segment *seg, const void *gradient, int64_t from,
                                       int64_t to, const int half) {
    const scalars *row = k->rows + seg->row;
    int64_t grad_size = k->gradient == FLOAT32 ? 4 : 2, average_size = k->average == FLOAT32 ? 4 : 2;
    int64_t master_size = half ? 4 : 2;
    int begun = row->mu != 1;
    narrow_scalars s = {factor(row->c), factor(row->minus_eta), factor(row->mu), factor(k->weight_decay),
                        (uint32_t)seg->key, 0, 0};
    /* torch rounds the factor of a scaled addition to 16 bits before its 16-bit vector loops. */
    if (k->mode == PLAIN) s.minus_eta = grid(s.minus_eta, half), s.weight_decay = grid(s.weight_decay, half);
    int source = factor(k->weight_decay) == 0 ? RAW : DECAYED;
    /* Only then loop() reads the 16-bit gradient itself, and nothing is prepared in memory. */
    int simple = !half && k->gradient != FLOAT32 && !k->maximize && !k->scaled && k->mode != STOCHASTIC;
    s.step_key = mix(s.key ^ mix((uint32_t)(uint64_t)row->t));
    /* What is left unwritten goes to the block that streaming has, which stays in the cache. */
    int streamed = k->streamed && !k->unwritten && !begun, apart = streamed || (k->unwritten && !begun);
    float g[BLOCK] LINED, averages[BLOCK] LINED;
    for (int64_t i = from, n; i < to; i += n) {
        char *average = (char *)seg->average + i * average_size, *ax = apart ? (char *)averages : average;
        n = until_block(average, average_size);
        if (n > to - i) n = to - i;
        int64_t lanes = seg->lanes - i < 0 ? 0 : seg->lanes - i > n ? n : seg->lanes - i;
        uint16_t *x = (uint16_t *)seg->param + i;
        char *master = seg->master ? (char *)seg->master + i * master_size : 0;
        const char *raw = (const char *)gradient + i * grad_size;
        s.first = (uint64_t)(seg->first + i);
        if (simple && (k->mode == MASTER || lanes == n)) {
            (source == RAW ? ISA(bfloat16_raw) : ISA(bfloat16_decayed))(k, &s, x, raw, ax, master, n, begun);
        } else {
            (half ? ISA(prepare_float16) : ISA(prepare_bfloat16))(k, x, master, raw, g, n, lanes);
            if (k->mode != PLAIN) lanes = n;
            (half ? ISA(float16_lanes) : ISA(bfloat16_lanes))(k, &s, x, g, ax, master, lanes, begun);
            if (lanes < n)
                (half ? ISA(float16_tail) : ISA(bfloat16_tail))(k, &s, x + lanes, g + lanes, ax + lanes * average_size,
                                                                master, n - lanes, begun);
        }
        if (streamed) stream(average, averages, n * average_size, WRITE_LINES);
    }
}

TARGET static void *ISA(update)(void *argument) {
    const thread_range *range = argument;
    const call *k = range->call;
    int64_t offset = 0;
    for (int64_t i = 0; i < k->num_segments; i++) {
        const segment *seg = k->segments + i;
        int64_t from = cut(range->start - offset, seg->numel), to = cut(range->stop - offset, seg->numel);
        offset += seg->numel;
        if (from >= to) continue;
        switch (k->param) {
        case FLOAT32: ISA(segment_float)(k, seg, k->gradients[i], from, to); break;
        case FLOAT64: ISA(segment_double)(k, seg, k->gradients[i], from, to); break;
        case BFLOAT16: ISA(segment_narrow)(k, seg, k->gradients[i], from, to, 0); break;
        default: ISA(segment_narrow)(k, seg, k->gradients[i], from, to, 1);
        }
    }
#if defined(__SSE2__)
    /* Streamed writes are seen by other threads only after a fence. */
    if (k->streamed) _mm_sfence();
#endif
    return 0;
}

#define MEAN_LOOPS(NAME, FROM, T)                                                                                      \
    APART void ISA(NAME)(const pair *p, double weight, int64_t from, int64_t to) {                                     \
        const FROM *x = (const FROM *)p->param + from;                                                                 \
        T *ax = (T *)p->average + from, w = (T)weight;                                                                 \
        if (w > (T)-0.5 && w < (T)0.5) NAME(x, ax, to - from, w, 1);                                                   \
        else NAME(x, ax, to - from, w - 1, 0);                                                                         \
    }
MEAN_LOOPS(mean_float32, float, float)
MEAN_LOOPS(mean_float64, double, double)
MEAN_LOOPS(mean_bfloat16, uint16_t, float)
MEAN_LOOPS(mean_float16, uint16_t, float)
#undef MEAN_LOOPS

TARGET static void *ISA(means)(void *argument) {
    const thread_range *range = argument;
    const mean_call *k = range->call;
    int64_t offset = 0;
    for (int64_t i = 0; i < k->num_pairs; i++) {
        const pair *p = k->pairs + i;
        int64_t from = cut(range->start - offset, p->numel), to = cut(range->stop - offset, p->numel);
        offset += p->numel;
        if (from >= to) continue;
        switch (k->param) {
        case FLOAT32: ISA(mean_float32)(p, k->weight, from, to); break;
        case FLOAT64: ISA(mean_float64)(p, k->weight, from, to); break;
        case BFLOAT16: ISA(mean_bfloat16)(p, k->weight, from, to); break;
        default: ISA(mean_float16)(p, k->weight, from, to);
        }
    }
    return 0;
}

#undef APART
#undef ISA
#undef TARGET
#undef WRITE_LINES
