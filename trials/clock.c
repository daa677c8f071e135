/* Moves the clock of a process by CLOCK_OFFSET seconds, for the trial "limits.py clocks".

   Like on a host with a wrong clock, only the time of day is wrong. libfaketime moves the monotonic
   clock too, and then waits with a timeout, such as Python's Event.wait(), never end. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long offset;

__attribute__((constructor)) static void start(void)
{
    const char *text = getenv("CLOCK_OFFSET");
    offset = text ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    long status = syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        now->tv_sec += offset;
    return (int)status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now)
{
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now)
        *now = found.tv_sec;
    return found.tv_sec;
}

/* The kernel compares the deadlines of semaphores with its own time of day. */
int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline)
{
    int (*next)(sem_t *, const struct timespec *) = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec moved = {deadline->tv_sec - offset, deadline->tv_nsec};
    return next(semaphore, &moved);
}
