/* Connections with a message there and back, many at a time. */
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    OPENING = 64, /* at a time, while filling: less than any backlog */
};

void (*echoed)(struct connection *);
void (*ended)(struct connection *);

static int epoll;

void start_epoll(void)
{
    if ((epoll = epoll_create1(0)) < 0)
        die("epoll_create1");
}

static void write_message(uint64_t words[MESSAGE / 8], uint64_t serial)
{
    for (int i = 0; i < MESSAGE / 8; i++)
        words[i] = (serial + i) * 0x9e3779b97f4a7c15;
}

static void watch(struct connection *c, int operation)
{
    struct epoll_event event = {.events = c->unsent ? EPOLLOUT : EPOLLIN, .data.ptr = c};
    if (epoll_ctl(epoll, operation, c->fd, &event) < 0)
        die("epoll_ctl");
}

void send_message(struct connection *c)
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
void open_connection(struct connection *c)
{
    c->fd = new_socket(SOCK_NONBLOCK);
    if (connect(c->fd, (struct sockaddr *)&server, sizeof server) < 0 && errno != EINPROGRESS)
        die("connect");
    send_message(c);
    watch(c, EPOLL_CTL_ADD);
}

void end_connection(struct connection *c)
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

void turn(void)
{
    struct epoll_event events[256];
    int count = epoll_wait(epoll, events, 256, -1);
    if (count < 0 && errno != EINTR)
        die("epoll_wait");
    for (int i = 0; i < count; i++)
        ready(events[i].data.ptr);
}

/* Opening a number of connections, with a message there and back on each. */

static struct connection *filling;
static long wanted, opening, opened;

static void note_open(struct connection *c)
{
    c->state = OPEN;
    opened++;
    if (opening < wanted)
        open_connection(&filling[opening++]);
}

static void not_opened(struct connection *c)
{
    (void)c;
    fprintf(stderr, "load: a connection ended while others were opened\n");
    exit(1);
}

void stay_closed(struct connection *c)
{
    (void)c;
}

/* *count* of them, and room for *spare* more. */
struct connection *open_all(long count, long spare)
{
    filling = allocate(count + spare, sizeof *filling);
    wanted = count;
    echoed = note_open;
    ended = not_opened;
    while (opening < count && opening < OPENING)
        open_connection(&filling[opening++]);
    while (opened < count)
        turn();
    return filling;
}
