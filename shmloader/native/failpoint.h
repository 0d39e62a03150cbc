/* failpoint.h - named points between the stores to shared memory, where a test can stop the world.
 *
 * SHML_FP("ring.commit.counted") sits between every two stores that another process could see. In a normal build
 * it is nothing. With -DSHML_FAILPOINTS it calls `shml_failpoint`, if a test set it: the test copies the
 * shared memory as a kill at that point would leave it, or kills the process there.
 */
#ifndef SHML_FAILPOINT_H
#define SHML_FAILPOINT_H

#ifdef SHML_FAILPOINTS
extern void (*shml_failpoint)(const char *name);
#define SHML_FP(name)                                                                                                  \
    do {                                                                                                               \
        if (shml_failpoint != NULL)                                                                                    \
            shml_failpoint(name);                                                                                      \
    } while (0)
#else
#define SHML_FP(name) ((void)0)
#endif
#endif
