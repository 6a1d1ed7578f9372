/* What is done with connections that carry messages. */
#include "load.h"

#include <stdio.h>
#include <string.h>

enum {
    REPLACING = 8, /* at a time, in window */
};

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

void churn(long count, long in_flight, const char *end)
{
    struct connection *connections = allocate(in_flight, sizeof *connections);
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

void window(long count, long open)
{
    struct connection *connections = open_all(open, REPLACING);
    size = open;
    total = count;
    oldest_first = allocate(open, sizeof *oldest_first);
    spare = allocate(REPLACING, sizeof *spare);
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

/* pingpong and lockstep: the same messages in two patterns. The connections stay open when
 * the last answer is there, and end, with a result of their own, once the next line asks for
 * that: what an ending costs is no part of what a message costs. */

static long sent, answered, under_way;

static void send_next(struct connection *c)
{
    sent++;
    under_way++;
    send_message(c);
}

static void note_answer(struct connection *c)
{
    c->state = OPEN;
    answered++;
    under_way--;
}

static void answer_at_once(struct connection *c)
{
    note_answer(c);
    if (sent < total)
        send_next(c);
}

static void message_lost(struct connection *c)
{
    c->fd = -1;
    if (c->state == ECHOING)
        under_way--;
}

static void send_on_all(struct connection *connections, long count)
{
    for (long i = 0; i < count && sent < total; i++)
        if (connections[i].fd != -1)
            send_next(&connections[i]);
    while (under_way)
        turn();
}

static void end_all(struct connection *connections, long count)
{
    print_result(answered);
    wait_for_line();
    ended = stay_closed;
    for (long i = 0; i < count; i++)
        if (connections[i].fd != -1)
            end_connection(&connections[i]);
    while (endings() < count)
        turn();
    print_result(endings());
}

/* Each connection sends again as soon as its own answer is there, so that the messages
 * arrive one by one. */
void pingpong(long count, long round_trips)
{
    struct connection *connections = open_all(count, 0);
    echoed = answer_at_once;
    ended = message_lost;
    total = round_trips;
    say_open();
    send_on_all(connections, count);
    end_all(connections, count);
}

/* All send, and none again before every answer is there. */
void lockstep(long count, long round_trips)
{
    struct connection *connections = open_all(count, 0);
    echoed = note_answer;
    ended = message_lost;
    total = round_trips;
    say_open();
    while (sent < total && endings() < count)
        send_on_all(connections, count);
    end_all(connections, count);
}

/* reset */

void reset(long count)
{
    struct connection *connections = open_all(count, 0);
    for (long i = 0; i < count; i++)
        connections[i].state = ENDING;
    ended = stay_closed;
    puts("open");
    start_clock();
    while (endings() < count)
        turn();
    print_result(endings());
}
