/* fault.c - saying what happened when a read-only view is written to.
 *
 * torch has no read-only tensors, so an in-place operation on a view of the ring ends in SIGSEGV. The handler
 * acts only on access faults (SEGV_ACCERR) inside our mappings: it tells what happened with one write(2), puts the
 * previous handler back and returns, so that the same instruction faults again into that one (torch's, faulthandler's
 * or the default). Every other fault goes to the previous handler at once.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "map.h"
#include "shml.h"

static struct sigaction previous;
static char report[1024];
static size_t report_bytes;
static volatile sig_atomic_t is_in_previous;
static pthread_mutex_t install_mutex = PTHREAD_MUTEX_INITIALIZER;

/* Tell what this fault is, in one call, so that other processes' lines do not come in between. */
static void tell(const shml_mapping_t *mapping)
{
    static char before[] = "shmloader: this process has no access to the ";
    static char after[] = " that the process which forked it had mapped: a sample or batch made before fork() is valid "
                          "there only. Read it again here.\n";
    struct iovec parts[3] = {{report, report_bytes}};
    int num_parts = 1;
    if (mapping->is_inherited) {
        parts[0] = (struct iovec){before, sizeof before - 1};
        parts[1] = (struct iovec){(void *)mapping->name, strlen(mapping->name)};
        parts[2] = (struct iovec){after, sizeof after - 1};
        num_parts = 3;
    }
    ssize_t written = writev(STDERR_FILENO, parts, num_parts);
    (void)written; /* nobody is left to be told that telling failed */
}

static void on_fault(int signal, siginfo_t *info, void *context)
{
    if (is_in_previous) { /* a handler installed after ours has called us, and we it: end as without either */
        sigaction(signal, &(struct sigaction){.sa_handler = SIG_DFL}, NULL);
        return;
    }
    const shml_mapping_t *mapping = info->si_code == SEGV_ACCERR ? shml_mapping_at((uintptr_t)info->si_addr) : NULL;
    if (mapping != NULL) {
        tell(mapping);
        sigaction(signal, &previous, NULL);
        return; /* and the same instruction faults again, into that one */
    }
    if (previous.sa_flags & SA_SIGINFO || (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)) {
        is_in_previous = 1;
        if (previous.sa_flags & SA_SIGINFO)
            previous.sa_sigaction(signal, info, context);
        else
            previous.sa_handler(signal);
        is_in_previous = 0;
        return;
    }
    sigaction(signal, &previous, NULL);
    if (info->si_code <= 0) /* sent by kill() or raise(): no instruction will fault again */
        raise(signal);
}

int shml_fault_report(const char *advice)
{
    pthread_mutex_lock(&install_mutex);
    strncpy(report, advice, sizeof report - 1);
    report_bytes = strlen(report);
    struct sigaction current;
    int failed = sigaction(SIGSEGV, NULL, &current) != 0;
    if (!failed && !(current.sa_flags & SA_SIGINFO && current.sa_sigaction == on_fault)) {
        struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
        sigemptyset(&action.sa_mask);
        previous = current;
        failed = sigaction(SIGSEGV, &action, NULL) != 0;
    }
    pthread_mutex_unlock(&install_mutex);
    return failed ? SHML_E_SYS : SHML_OK;
}
