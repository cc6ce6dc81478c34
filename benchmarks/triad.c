/* The machine's limits. For a step: per element three reads, two writes, in place, and almost no arithmetic; and for the
   update of an average alone two reads and one write. */
#include <pthread.h>
#include <stdint.h>

typedef struct {
    float *restrict p, *restrict ax;
    const float *restrict g;
    int64_t numel;
    float s;
} part;

static void *run(void *argument) {
    part *t = argument;
    for (int64_t i = 0; i < t->numel; i++) {
        t->p[i] += t->s * t->g[i];
        t->ax[i] += t->s * t->p[i];
    }
    return 0;
}

void triad(float *p, const float *g, float *ax, int64_t numel, float s, int64_t num_threads) {
    pthread_t threads[64];
    part parts[64];
    int64_t count = num_threads > 64 ? 64 : num_threads;
    for (int64_t i = 0; i < count; i++) {
        int64_t start = numel / count * i, stop = i == count - 1 ? numel : numel / count * (i + 1);
        parts[i] = (part){p + start, ax + start, g + start, stop - start, s};
        if (i) pthread_create(&threads[i], 0, run, &parts[i]);
    }
    run(&parts[0]);
    for (int64_t i = 1; i < count; i++) pthread_join(threads[i], 0);
}

void mean(const float *restrict p, float *restrict ax, int64_t numel, float weight) {
    for (int64_t i = 0; i < numel; i++) ax[i] += (p[i] - ax[i]) * weight;
}
