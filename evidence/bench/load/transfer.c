/* A stream of bytes on one connection. */
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

enum {
    PERIOD = 256, /* of the bytes */
};

void transfer(long up, long down)
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
