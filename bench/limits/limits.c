/* The limits of a machine, without any library: copies in memory, flags between two processes in shared memory, and TCP
 * over loopback. Compiled by bench.limits.native when it is needed.
 *
 *   limits memcpy BYTES SECONDS            one thread copies; prints nanoseconds per copy
 *   limits flag BYTES SECONDS WAIT CORES   two processes take turns: payload, flag, wait; prints ns per round trip
 *   limits swap BYTES SECONDS WAIT CORES   both store at the same time, then both wait: an exchange of two ranks; ns per
 *                                          exchange
 *   limits tcp BYTES SECONDS               two processes bounce a message over loopback; prints ns per round trip
 *   limits tcpstream BYTES SECONDS         one process writes messages, the other reads; prints ns per message
 *
 * WAIT is spin or yield. CORES is a pair such as 0,1 or 0,0 (pinned), or free.
 * Several numbers are printed, one a line: each a batch of some milliseconds, so that the caller can take medians.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LINE 64
#define BATCH_NS 5000000.0 /* of one printed number, about */

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e9 + t.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static char *memory(size_t bytes, int shared) {
    char *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | (shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);
    if (p == MAP_FAILED) fail("mmap");
    memset(p, 1, bytes);
    return p;
}

static void pin(const char *cores, int which) {
    int core[2];
    if (sscanf(cores, "%d,%d", &core[0], &core[1]) != 2) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core[which], &set);
    if (sched_setaffinity(0, sizeof set, &set)) fail("sched_setaffinity");
}

/* Runs `once` for `seconds`, in batches; prints nanoseconds per call. The first batch finds out how long a call takes. */
static void repeat(double seconds, void (*once)(void *), void *with, int print) {
    double end = now() + seconds * 1e9;
    long calls = 1;
    while (now() < end) {
        double begin = now();
        for (long i = 0; i < calls; i++) once(with);
        double took = now() - begin;
        if (took > BATCH_NS / 2 && print) printf("%.2f\n", took / calls);
        if (took < BATCH_NS / 2) calls *= 2;
    }
}

/* --- memcpy --- */

struct copy {
    char *to, *from;
    size_t bytes;
};

static void copy_once(void *with) {
    struct copy *c = with;
    memcpy(c->to, c->from, c->bytes);
    __asm__ volatile("" ::"r"(c->to), "r"(c->from) : "memory");
}

/* --- two processes and their flags --- */

struct side {
    volatile _Atomic uint64_t *mine, *theirs; /* flags: mine is what I wait for */
    char *out, *payload;                      /* where I store, what I store */
    size_t bytes;
    uint64_t turn;
    int yield, first, swap;
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb" ::: "memory");
#endif
}

static void await(struct side *s) {
    while (atomic_load_explicit(s->mine, memory_order_acquire) < s->turn)
        if (s->yield) sched_yield();
        else relax();
}

static void tell(struct side *s) {
    memcpy(s->out, s->payload, s->bytes);
    atomic_store_explicit(s->theirs, s->turn, memory_order_release);
}

static void flag_once(void *with) {
    struct side *s = with;
    s->turn++;
    if (s->swap || s->first) {
        tell(s);
        await(s);
    } else {
        await(s);
        tell(s);
    }
}

static void flags(size_t bytes, double seconds, const char *wait_, const char *cores, int swap) {
    size_t room = (bytes + 4095) / 4096 * 4096 + 4096;
    char *shared = memory(2 * room, 1);
    memset(shared, 0, 2 * LINE);
    memset(shared + room, 0, 2 * LINE); /* a half: a flag, and from 4096 on what the other side stores */
    pid_t parent = getpid(), child = fork();
    if (child < 0) fail("fork");
    int which = child == 0;
    if (which) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) exit(1);
    }
    pin(cores, which);
    char *my_half = shared + which * room, *their_half = shared + !which * room;
    struct side s = {(void *)my_half, (void *)their_half, their_half + 4096, memory(room, 0), bytes, 0,
                     strcmp(wait_, "yield") == 0, !which, swap};
    if (which)
        for (;;) flag_once(&s); /* until the parent kills it */
    repeat(seconds, flag_once, &s, 1);
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
}

/* --- TCP --- */

struct link {
    int socket;
    char *buffer;
    size_t bytes;
};

static int send_all(struct link *l) {
    for (size_t done = 0; done < l->bytes;) {
        ssize_t n = send(l->socket, l->buffer + done, l->bytes - done, MSG_NOSIGNAL);
        if (n <= 0) return 0;
        done += n;
    }
    return 1;
}

static int receive_all(struct link *l) {
    for (size_t done = 0; done < l->bytes;) {
        ssize_t n = recv(l->socket, l->buffer + done, l->bytes - done, 0);
        if (n <= 0) return 0;
        done += n;
    }
    return 1;
}

static void bounce_once(void *with) {
    if (!send_all(with) || !receive_all(with)) fail("tcp");
}

static void receive_once(void *with) {
    if (!receive_all(with)) fail("tcp");
}

static void tcp(size_t bytes, double seconds, int stream) {
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof a;
    if (listener < 0 || bind(listener, (void *)&a, sizeof a) || listen(listener, 1) ||
        getsockname(listener, (void *)&a, &length))
        fail("listen");
    pid_t child = fork();
    if (child < 0) fail("fork");
    struct link l = {.buffer = memory(bytes + 1, 0), .bytes = bytes};
    if (child == 0) {
        l.socket = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(l.socket, (void *)&a, sizeof a)) fail("connect");
        setsockopt(l.socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        while (stream ? send_all(&l) : receive_all(&l) && send_all(&l)) {
        }
        exit(0); /* the parent has closed */
    }
    l.socket = accept(listener, NULL, NULL);
    if (l.socket < 0) fail("accept");
    setsockopt(l.socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    repeat(seconds, stream ? receive_once : bounce_once, &l, 1);
    close(l.socket);
    waitpid(child, NULL, 0);
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "see the head of limits.c\n");
        return 2;
    }
    const char *what = argv[1];
    size_t bytes = strtoull(argv[2], NULL, 10);
    double seconds = atof(argv[3]);
    if (!strcmp(what, "memcpy")) {
        struct copy c = {memory(bytes, 0), memory(bytes, 0), bytes};
        repeat(seconds, copy_once, &c, 1);
    } else if ((!strcmp(what, "flag") || !strcmp(what, "swap")) && argc == 6) {
        flags(bytes, seconds, argv[4], argv[5], what[0] == 's');
    } else if (!strcmp(what, "tcp")) {
        tcp(bytes, seconds, 0);
    } else if (!strcmp(what, "tcpstream")) {
        tcp(bytes, seconds, 1);
    } else {
        fprintf(stderr, "what is %s?\n", what);
        return 2;
    }
    return 0;
}
