#include "load.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

enum {
    TIMEOUT = 300, /* seconds, for everything */
};

static const char usage[] =
    "load churn PORT COUNT IN_FLIGHT fin|rst|eof   a message there and back, and the end;\n"
    "                                              with eof, ours comes first\n"
    "load window PORT COUNT OPEN       replace the oldest of OPEN connections, COUNT times,\n"
    "                                  for each line on stdin\n"
    "load pingpong PORT CONNECTIONS ROUNDTRIPS     each sends when its own answer is there;\n"
    "                                  the connections end for a second line on stdin\n"
    "load lockstep PORT CONNECTIONS ROUNDTRIPS     all send when all answers are there\n"
    "load echo PORT BYTES              there and back at the same time, one connection\n"
    "load download PORT BYTES          says how many, reads as many\n"
    "load reset PORT COUNT             keep connections open until the server ends them\n";

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
    start_epoll();

    if (count == 6 && !strcmp(mode, "churn"))
        churn(first, second, words[5]);
    else if (count == 5 && !strcmp(mode, "window"))
        window(first, second);
    else if (count == 5 && !strcmp(mode, "pingpong"))
        pingpong(first, second);
    else if (count == 5 && !strcmp(mode, "lockstep"))
        lockstep(first, second);
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
