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
#include <unistd.h>

#include "map.h"
#include "shml.h"

static struct sigaction previous;
static char report[1024];
static size_t report_bytes;
static char inherited_report[] =
    "shmloader: access to a view of a sample that was made before fork(): it is valid in the parent process only. "
    "Read the sample again in this process.\n";
static pthread_mutex_t install_mutex = PTHREAD_MUTEX_INITIALIZER;

static void on_fault(int signal, siginfo_t *info, void *context)
{
    if (info->si_code == SEGV_ACCERR) {
        const shml_mapping_t *mapping = shml_mapping_at((uintptr_t)info->si_addr);
        const char *text = mapping == NULL ? NULL : mapping->is_inherited ? inherited_report : report;
        size_t num_bytes = text == report ? report_bytes : text == NULL ? 0 : sizeof inherited_report - 1;
        while (num_bytes > 0) {
            ssize_t n = write(STDERR_FILENO, text, num_bytes);
            if (n <= 0)
                break;
            text += n;
            num_bytes -= (size_t)n;
        }
        sigaction(SIGSEGV, &previous, NULL);
        return;
    }
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal);
    } else {
        sigaction(SIGSEGV, &previous, NULL);
    }
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
