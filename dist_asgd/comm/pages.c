/* Signals between processes that share a page, and sums of values that lie in shared pages. Plain C without Python's
 * or torch's headers; pages.py loads it through ctypes.
 *
 * A signal is a counter of 32 bits that only grows, modulo 2^32, and that one process writes. Whoever waits for it spins
 * for a moment and then sleeps in the kernel (futex(2)), so that no core is busy where ranks outnumber cores. */
#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

#define ABI 3

/* Older headers lack them; the numbers of later calls are those of every architecture. */
#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef MFD_CLOEXEC
#define MFD_CLOEXEC 1U
#endif

/* One cache line: the counter, and how many processes sleep until it changes. */
typedef struct {
    uint32_t count, sleepers;
} signal_line;

int64_t dist_asgd_pages_abi(void) { return ABI; }

/* A descriptor, or -errno. Python has both calls only if it was built with a recent libc, which that of conda is not. */
int64_t dist_asgd_memory_file(void) {
#ifdef SYS_memfd_create
    long found = syscall(SYS_memfd_create, "dist_asgd", MFD_CLOEXEC);
    return found < 0 ? -errno : found;
#else
    return -ENOSYS;
#endif
}

int64_t dist_asgd_process_descriptor(int64_t process) {
    long found = syscall(SYS_pidfd_open, (pid_t)process, 0);
    return found < 0 ? -errno : found;
}

static int reached(const signal_line *line, uint32_t wanted) {
    return (int32_t)(__atomic_load_n(&line->count, __ATOMIC_ACQUIRE) - wanted) >= 0;
}

int64_t dist_asgd_reached(const signal_line *line, uint32_t wanted) { return reached(line, wanted); }

/* Everything that this process has written before is visible to whoever sees the new count. */
void dist_asgd_signal(signal_line *line, uint32_t count) {
    __atomic_store_n(&line->count, count, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&line->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &line->count, FUTEX_WAKE, INT32_MAX, 0, 0, 0);
}

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Waits until the counter has reached `wanted`, for `sleep_ns` at most; returns whether it has. Before it sleeps it spins
 * for `spin_ns`, and gives the core to whoever wants it meanwhile. */
int64_t dist_asgd_await(signal_line *line, uint32_t wanted, int64_t spin_ns, int64_t sleep_ns) {
    if (reached(line, wanted)) return 1;
    int64_t start = now_ns();
    while (now_ns() - start < spin_ns) {
        for (int i = 0; i < 64; i++)
            if (reached(line, wanted)) return 1;
        sched_yield();
    }
    int64_t deadline = start + spin_ns + sleep_ns;
    for (;;) {
        /* The order matters: whoever signals stores the count and then looks for sleepers. */
        __atomic_add_fetch(&line->sleepers, 1, __ATOMIC_SEQ_CST);
        uint32_t seen = __atomic_load_n(&line->count, __ATOMIC_SEQ_CST);
        int64_t left = deadline - now_ns();
        if ((int32_t)(seen - wanted) < 0 && left > 0) {
            struct timespec timeout = {left / 1000000000, left % 1000000000};
            syscall(SYS_futex, &line->count, FUTEX_WAIT, seen, &timeout, 0, 0);
        }
        __atomic_sub_fetch(&line->sleepers, 1, __ATOMIC_SEQ_CST);
        if (reached(line, wanted)) return 1;
        if (now_ns() >= deadline) return 0;
    }
}

/* The sum of `num` arrays in their order, divided, as torch has it. The first array may be `out`. */
#define FOLD(name, type)                                                                                               \
    void name(type *out, const type *const *values, int64_t num, int64_t numel, int64_t divisor) {                     \
        type count = (type)divisor;                                                                                    \
        if (num == 2) {                                                                                                \
            const type *a = values[0], *b = values[1];                                                                 \
            for (int64_t i = 0; i < numel; i++) out[i] = (a[i] + b[i]) / count;                                        \
            return;                                                                                                    \
        }                                                                                                              \
        enum { BLOCK = 2048 };                                                                                         \
        for (int64_t first = 0; first < numel; first += BLOCK) {                                                       \
            int64_t n = numel - first < BLOCK ? numel - first : BLOCK;                                                 \
            type sum[BLOCK];                                                                                           \
            for (int64_t i = 0; i < n; i++) sum[i] = values[0][first + i] + values[1][first + i];                      \
            for (int64_t k = 2; k < num; k++)                                                                          \
                for (int64_t i = 0; i < n; i++) sum[i] += values[k][first + i];                                        \
            for (int64_t i = 0; i < n; i++) out[first + i] = sum[i] / count;                                           \
        }                                                                                                              \
    }
FOLD(dist_asgd_fold_float32, float)
FOLD(dist_asgd_fold_float64, double)
