/* test.h - a tiny harness: named tests, checks that say where, a watchdog for each test, one closing line.
 *
 * A failed check ends its test, not the program; in a forked child (test_child) it ends the child with status 99.
 * `program [PART]` runs only tests whose names contain PART. Every program includes this once.
 */
#ifndef SHML_TEST_H
#define SHML_TEST_H

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define TEST_TIMEOUT_S 120
#define TEST_UNUSED    __attribute__((unused))

typedef struct test {
    const char *name;
    void (*run)(void);
} test_t;
#define TEST(function) {#function, function}

static jmp_buf test_end;
static const char *test_name = "";
static int test_in_child;
/* What a loop is at, shown when a check fails: test_note("seed %d", seed). */
static char test_context[256];

TEST_UNUSED __attribute__((format(printf, 1, 2))) static void test_note(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(test_context, sizeof test_context, format, args);
    va_end(args);
}

TEST_UNUSED __attribute__((noreturn, format(printf, 3, 4))) static void test_fail(const char *file, int line,
                                                                                  const char *format, ...)
{
    va_list args;
    printf("%s:%d: %s: ", file, line, test_name);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("%s%s\n", test_context[0] != '\0' ? " at " : "", test_context);
    fflush(stdout);
    if (test_in_child)
        _exit(99);
    longjmp(test_end, 1);
}

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            test_fail(__FILE__, __LINE__, "not so: %s", #condition);                                                   \
    } while (0)

/* Integers of any kind. */
#define CHECK_EQ(got, want)                                                                                            \
    do {                                                                                                               \
        long long got_ = (long long)(got), want_ = (long long)(want);                                                  \
        if (got_ != want_)                                                                                             \
            test_fail(__FILE__, __LINE__, "%s is %lld, not %s = %lld", #got, got_, #want, want_);                      \
    } while (0)

#define CHECK_TEXT(got, want)                                                                                          \
    do {                                                                                                               \
        const char *got_ = (got), *want_ = (want);                                                                     \
        if (strcmp(got_, want_) != 0)                                                                                  \
            test_fail(__FILE__, __LINE__, "%s is \"%s\", not \"%s\"", #got, got_, want_);                              \
    } while (0)

static void test_alarm(int signal_number)
{
    (void)signal_number;
    const char *parts[] = {"\n", test_name, ": took longer than its watchdog allows", test_context, "\n"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (write(1, parts[i], strlen(parts[i])) < 0)
            break;
    _exit(124);
}

/* splitmix64 (Steele et al. 2014): the same numbers on every machine. */
TEST_UNUSED static uint64_t test_random(uint64_t *seed)
{
    uint64_t z = *seed += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* fork; in the child checks end the process, and the watchdog goes on. */
TEST_UNUSED static pid_t test_child(void)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid == 0) {
        test_in_child = 1;
        alarm(TEST_TIMEOUT_S);
    }
    return pid;
}

static int test_main(int argc, char **argv, const test_t *tests, size_t num_tests)
{
    volatile int passed = 0, failed = 0;
    signal(SIGALRM, test_alarm);
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (volatile size_t i = 0; i < num_tests; i++) {
        if (argc > 1 && strstr(tests[i].name, argv[1]) == NULL)
            continue;
        test_name = tests[i].name;
        test_context[0] = '\0';
        alarm(TEST_TIMEOUT_S);
        if (setjmp(test_end) == 0) {
            tests[i].run();
            passed++;
        } else {
            failed++;
        }
        alarm(0);
    }
    const char *program = strrchr(argv[0], '/');
    printf("%s: %d passed, %d failed\n", program != NULL ? program + 1 : argv[0], passed, failed);
    return failed > 0 || passed == 0;
}
#define TEST_MAIN(...)                                                                                                 \
    int main(int argc, char **argv)                                                                                    \
    {                                                                                                                  \
        static const test_t tests[] = {__VA_ARGS__};                                                                   \
        return test_main(argc, argv, tests, sizeof tests / sizeof *tests);                                             \
    }
#endif
