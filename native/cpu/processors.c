/* How many threads a team has if nobody says. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <unistd.h>

#include "internal.h"

/* One thread per physical core that this process may run on, within the CPU quota of its control group. */
int tops_processors(void) {
    int count = 0;
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            char path[96];
            int first = cpu;
            snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
            FILE *file = fopen(path, "r");
            if (file) {
                if (fscanf(file, "%d", &first) != 1) first = cpu;
                fclose(file);
            }
            count += first == cpu || first >= CPU_SETSIZE || !CPU_ISSET(first, &allowed);
        }
    }
    FILE *file = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (file) {
        long quota, period;
        if (fscanf(file, "%ld %ld", &quota, &period) == 2 && period > 0 && quota / period >= 1 && quota / period < count) count = (int)(quota / period);
        fclose(file);
    }
#endif
    if (count < 1) count = (int)sysconf(_SC_NPROCESSORS_ONLN);
    return count < 1 ? 1 : count;
}
