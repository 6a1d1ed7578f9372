/* The load for bench/servers.py: `load MODE PORT ...`, see `usage`.
 *
 * Each mode opens what it needs, prints "open", waits for a line on stdin or its end (reset
 * does not), does its work, and prints one line of JSON with what it did and saw. Messages
 * have 64 bytes, come back as they were, and differ from each other.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    MESSAGE = 64,
    CHUNK = 65536,
    PERIOD = 256,   /* of the bytes in echo and download */
    OPENING = 64,   /* at a time, while filling: less than any backlog */
    REPLACING = 8,  /* at a time, in window */
    SOURCES = 200,  /* addresses: each has ports of its own for TIME_WAIT */
    TIMEOUT = 300,  /* seconds, for everything */
};

static const char usage[] =
    "load churn PORT COUNT IN_FLIGHT fin|rst|eof   a message there and back, and the end;\n"
    "                                              with eof, ours comes first\n"
    "load window PORT COUNT OPEN       replace the oldest of OPEN connections, COUNT times,\n"
    "                                  for each line on stdin\n"
    "load pingpong PORT CONNECTIONS ROUNDTRIPS\n"
    "load echo PORT BYTES              there and back at the same time, one connection\n"
    "load download PORT BYTES          says how many, reads as many\n"
    "load reset PORT COUNT             keep connections open until the server ends them\n";

enum state {
    ECHOING, /* a message is under way */
    OPEN,    /* nothing is */
    ENDING,  /* we wait for the end; before that, any end is wrong */
};

struct connection {
    int fd;
    enum state state;
    bool unsent;
    size_t received;
    uint64_t serial; /* of the message */
};

static struct sockaddr_in server = {.sin_family = AF_INET};
static int epoll;
static struct connection *connections;
static char buffer[4 * CHUNK];

/* What a mode does when a message is back, and when a connection is over. */
static void (*echoed)(struct connection *);
static void (*ended)(struct connection *);

static long fin, rst, other, wrong;
static double start, start_cpu;

static void die(const char *what)
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

static void start_clock(void)
{
    start = seconds(CLOCK_MONOTONIC);
    start_cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
}

static long endings(void)
{
    return fin + rst + other;
}

static void print_result(long done)
{
    double now = seconds(CLOCK_MONOTONIC);
    printf("{\"done\": %ld, \"fin\": %ld, \"rst\": %ld, \"other\": %ld, \"wrong\": %ld, "
           "\"seconds\": %.9f, \"cpu\": %.9f, \"moment\": %.9f}\n",
           done, fin, rst, other, wrong, now - start,
           seconds(CLOCK_PROCESS_CPUTIME_ID) - start_cpu, now);
}

static void wait_for_line(void)
{
    int c;
    while ((c = getchar()) != '\n' && c != EOF)
        ;
}

static void say_open(void)
{
    puts("open");
    wait_for_line();
    start_clock();
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (!memory)
        die("calloc");
    return memory;
}

/* From one of the source addresses in turn: 127.0.0.2 and on. */
static int new_socket(int flags)
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

static void write_message(uint64_t words[MESSAGE / 8], uint64_t serial)
{
    for (int i = 0; i < MESSAGE / 8; i++)
        words[i] = (serial + i) * 0x9e3779b97f4a7c15;
}

static long differences(const char *a, const char *b, size_t size)
{
    long count = 0;
    if (memcmp(a, b, size) != 0)
        for (size_t i = 0; i < size; i++)
            count += a[i] != b[i];
    return count;
}

static void watch(struct connection *c, int operation)
{
    struct epoll_event event = {.events = c->unsent ? EPOLLOUT : EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll, operation, c->fd, &event) < 0)
        die("epoll_ctl");
}

static void send_message(struct connection *c)
{
    static uint64_t serial;
    uint64_t words[MESSAGE / 8];
    c->state = ECHOING;
    c->received = 0;
    c->serial = ++serial;
    write_message(words, c->serial);
    c->unsent = send(c->fd, words, MESSAGE, MSG_NOSIGNAL) != MESSAGE;
}

/* On loopback the connection is there when connect() returns, so the message goes out at
 * once; if the server has no room in its backlog, it has to wait. */
static void open_connection(struct connection *c)
{
    c->fd = new_socket(SOCK_NONBLOCK);
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS)
        die("connect");
    send_message(c);
    watch(c, EPOLL_CTL_ADD);
}

static void end_connection(struct connection *c)
{
    c->state = ENDING;
    if (shutdown(c->fd, SHUT_WR) < 0 && errno != ENOTCONN)
        die("shutdown");
}

static void over(struct connection *c, ssize_t n)
{
    if (c->state != ENDING)
        other++;
    else if (n == 0)
        fin++;
    else if (errno == ECONNRESET)
        rst++;
    else
        other++;
    close(c->fd);
    ended(c);
}

static void ready(struct connection *c)
{
    uint64_t words[MESSAGE / 8];
    ssize_t n;
    if (c->unsent) {
        send_message(c);
        watch(c, EPOLL_CTL_MOD);
        return;
    }
    n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n <= 0) {
        if (n == 0 || errno != EAGAIN)
            over(c, n);
        return;
    }
    if (c->state != ECHOING || c->received + n > MESSAGE) {
        wrong += n;
        return;
    }
    write_message(words, c->serial);
    wrong += differences(buffer, (char *)words + c->received, n);
    c->received += n;
    if (c->received == MESSAGE)
        echoed(c);
}

static void turn(void)
{
    struct epoll_event events[256];
    int count = epoll_wait(epoll, events, 256, -1);
    if (count < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < count; i++)
        ready(events[i].data.ptr);
}

/* Opening a number of connections, with a message there and back on each. */

static long wanted, opening, opened;

static void note_open(struct connection *c)
{
    c->state = OPEN;
    opened++;
    if (opening < wanted)
        open_connection(&connections[opening++]);
}

static void not_opened(struct connection *c)
{
    (void)c;
    fprintf(stderr, "load: a connection ended while others were opened\n");
    exit(1);
}

static void stay_closed(struct connection *c)
{
    (void)c;
}

static void open_all(long count, long at_a_time)
{
    wanted = count;
    echoed = note_open;
    ended = not_opened;
    while (opening < count && opening < at_a_time)
        open_connection(&connections[opening++]);
    while (opened < count)
        turn();
}

/* churn */

static long started, total;
static bool end_first;

static void churn_echoed(struct connection *c)
{
    if (end_first)
        end_connection(c);
    else
        c->state = ENDING;
}

static void churn_ended(struct connection *c)
{
    if (started < total) {
        started++;
        open_connection(c);
    }
}

static void churn(long count, long in_flight, const char *end)
{
    connections = allocate(in_flight, sizeof *connections);
    echoed = churn_echoed;
    ended = churn_ended;
    end_first = strcmp(end, "eof") == 0;
    total = count;
    say_open();
    while (started < total && started < in_flight)
        open_connection(&connections[started++]);
    while (endings() < total)
        turn();
    print_result(endings());
}

/* window */

static struct connection **oldest_first, **spare;
static long size, oldest, spares;

static void window_echoed(struct connection *c)
{
    struct connection *replaced = oldest_first[oldest];
    c->state = OPEN;
    oldest_first[oldest] = c;
    oldest = (oldest + 1) % size;
    end_connection(replaced);
}

static void window_ended(struct connection *c)
{
    spare[spares++] = c;
    if (started < total) {
        started++;
        open_connection(spare[--spares]);
    }
}

static void window(long count, long open)
{
    size = open;
    total = count;
    connections = allocate(open + REPLACING, sizeof *connections);
    oldest_first = allocate(open, sizeof *oldest_first);
    spare = allocate(REPLACING, sizeof *spare);
    open_all(open, OPENING);
    for (long i = 0; i < open; i++)
        oldest_first[i] = &connections[i];
    for (; spares < REPLACING; spares++)
        spare[spares] = &connections[open + spares];
    echoed = window_echoed;
    ended = window_ended;
    say_open();
    for (;;) {
        while (started < total && spares) {
            started++;
            open_connection(spare[--spares]);
        }
        while (endings() < total)
            turn();
        print_result(endings());
        if (feof(stdin))
            break;
        wait_for_line();
        started = fin = rst = other = wrong = 0;
        start_clock();
    }
}

/* pingpong */

static void pingpong_echoed(struct connection *c)
{
    if (started < total) {
        started++;
        send_message(c);
    } else {
        end_connection(c);
    }
}

static void pingpong(long count, long round_trips)
{
    connections = allocate(count, sizeof *connections);
    total = round_trips;
    open_all(count, OPENING);
    echoed = pingpong_echoed;
    ended = stay_closed;
    say_open();
    for (long i = 0; i < count; i++, started++)
        send_message(&connections[i]);
    while (endings() < count)
        turn();
    print_result(started);
}

/* reset */

static void reset(long count)
{
    connections = allocate(count, sizeof *connections);
    open_all(count, OPENING);
    for (long i = 0; i < count; i++)
        connections[i].state = ENDING;
    ended = stay_closed;
    puts("open");
    start_clock();
    while (endings() < count)
        turn();
    print_result(endings());
}

/* echo and download */

static void transfer(long up, long down)
{
    static char pattern[sizeof buffer + PERIOD];
    long sent = 0, received = 0;
    int fd = new_socket(0), one = 1;
    ssize_t n;
    for (size_t i = 0; i < sizeof pattern; i++)
        pattern[i] = i % PERIOD;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&server, sizeof server) < 0)
        die("connect");
    say_open();
    if (!up && dprintf(fd, "%ld", down) < 0)
        die("dprintf");
    do {
        struct pollfd poller = {.fd = fd, .events = sent < up ? POLLIN | POLLOUT : POLLIN};
        if (poll(&poller, 1, -1) < 0)
            die("poll");
        if (poller.revents & POLLOUT) {
            size_t left = up - sent < CHUNK ? up - sent : CHUNK;
            n = send(fd, pattern + sent % PERIOD, left, MSG_DONTWAIT | MSG_NOSIGNAL);
            if (n < 0 && errno != EAGAIN)
                break;
            sent += n > 0 ? n : 0;
            if (sent == up)
                shutdown(fd, SHUT_WR);
        }
        n = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
        if (n > 0) {
            wrong += differences(buffer, pattern + received % PERIOD, n);
            received += n;
        }
    } while (n > 0 || (n < 0 && errno == EAGAIN));
    fin = n == 0;
    rst = n < 0 && errno == ECONNRESET;
    other = !fin && !rst;
    wrong += labs(down - received);
    print_result(received);
}

static long number(const char *text)
{
    char *end;
    long value = strtol(text, &end, 10);
    if (*end || value <= 0) {
        fprintf(stderr, "load: %s is not a positive number\n%s", text, usage);
        exit(2);
    }
    return value;
}

int main(int count, char **words)
{
    struct rlimit files;
    const char *mode = count > 1 ? words[1] : "";
    long first = count > 3 ? number(words[3]) : 0, second = count > 4 ? number(words[4]) : 0;

    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    server.sin_port = htons(count > 2 ? number(words[2]) : 0);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(TIMEOUT);
    epoll = epoll_create1(0);

    if (count == 6 && !strcmp(mode, "churn"))
        churn(first, second, words[5]);
    else if (count == 5 && !strcmp(mode, "window"))
        window(first, second);
    else if (count == 5 && !strcmp(mode, "pingpong"))
        pingpong(first, second);
    else if (count == 4 && !strcmp(mode, "echo"))
        transfer(first, first);
    else if (count == 4 && !strcmp(mode, "download"))
        transfer(0, first);
    else if (count == 4 && !strcmp(mode, "reset"))
        reset(first);
    else {
        fputs(usage, stderr);
        return 2;
    }
    return 0;
}
