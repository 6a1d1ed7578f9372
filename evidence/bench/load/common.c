/* What all modes share: the clock, the result, the socket. */
#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum {
    SOURCES = 200, /* addresses: each has ports of its own for TIME_WAIT */
};

struct sockaddr_in server = {.sin_family = AF_INET};
char buffer[4 * CHUNK];
long fin, rst, other, wrong;

static double start, start_cpu;

_Noreturn void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double seconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

void start_clock(void)
{
    start = seconds(CLOCK_MONOTONIC);
    start_cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
}

long endings(void)
{
    return fin + rst + other;
}

void print_result(long done)
{
    double now = seconds(CLOCK_MONOTONIC);
    printf("{\"done\": %ld, \"fin\": %ld, \"rst\": %ld, \"other\": %ld, \"wrong\": %ld, "
           "\"seconds\": %.9f, \"cpu\": %.9f, \"moment\": %.9f}\n",
           done, fin, rst, other, wrong, now - start,
           seconds(CLOCK_PROCESS_CPUTIME_ID) - start_cpu, now);
}

void wait_for_line(void)
{
    int c;
    while ((c = getchar()) != '\n' && c != EOF)
        ;
}

void say_open(void)
{
    puts("open");
    wait_for_line();
    start_clock();
}

void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        die("calloc");
    return memory;
}

/* From one of the source addresses in turn: 127.0.0.2 and on. */
int new_socket(int flags)
{
    static uint32_t turn;
    struct sockaddr_in source = {.sin_family = AF_INET};
    int fd = socket(AF_INET, SOCK_STREAM | flags, 0), one = 1;
    if (fd < 0)
        die("socket");
    source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + SOURCES - turn++ % SOURCES);
    setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&source, sizeof source) < 0)
        die("bind");
    return fd;
}

long differences(const char *a, const char *b, size_t size)
{
    long count = 0;
    if (memcmp(a, b, size) != 0)
        for (size_t i = 0; i < size; i++)
            count += a[i] != b[i];
    return count;
}
