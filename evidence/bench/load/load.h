/* The load for bench/servers.py: see `usage` in main.c.
 *
 * Each mode opens what it needs, prints "open", waits for a line on stdin or its end (reset
 * does not), does its work, and prints one line of JSON with what it did and saw. Messages
 * have 64 bytes, come back as they were, and differ from each other.
 */
#ifndef LOAD_H
#define LOAD_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MESSAGE = 64,
    CHUNK = 65536,
};

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

extern struct sockaddr_in server;
extern char buffer[4 * CHUNK];

/* What was seen: connections, and bytes. */
extern long fin, rst, other, wrong;

/* What a mode does when a message is back, and when a connection is over. */
extern void (*echoed)(struct connection *);
extern void (*ended)(struct connection *);

/* common.c */
_Noreturn void die(const char *what);
void *allocate(size_t count, size_t size);
void start_clock(void);
void wait_for_line(void);
void say_open(void);
void print_result(long done);
long endings(void);
long differences(const char *a, const char *b, size_t size);
int new_socket(int flags);

/* connection.c */
void start_epoll(void);
void send_message(struct connection *c);
void open_connection(struct connection *c);
void end_connection(struct connection *c);
void stay_closed(struct connection *c);
void turn(void);
struct connection *open_all(long count, long spare);

/* modes.c and transfer.c: what main.c's usage says */
void churn(long count, long in_flight, const char *end);
void window(long count, long open);
void pingpong(long count, long round_trips);
void lockstep(long count, long round_trips);
void reset(long count);
void transfer(long up, long down);

#endif
