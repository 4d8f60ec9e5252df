/* Preloaded into a process (see scripts/without-vnni), it makes CPUID answer as on a processor with AVX2 and nothing newer:
   no AVX512, no VNNI of 256 or 512 bits, no AMX. ONNX Runtime, OpenVINO, oneDNN and torch then take the kernels they take
   there. It needs Linux on x86-64 with CPUID faulting (flag cpuid_fault of /proc/cpuinfo): the kernel turns the instruction
   into SIGSEGV, and the handler below answers in its place. Source: arch_prctl(2), ARCH_SET_CPUID. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

static struct sigaction others; /* what the program has set for SIGSEGV */
static int (*next_sigaction)(int, const struct sigaction *, struct sigaction *);

static long cpuid_enabled(int yes) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, yes); }

static void hide(uint32_t leaf, uint32_t subleaf, uint32_t *eax, uint32_t *ebx, uint32_t *ecx, uint32_t *edx) {
    if (leaf != 7) return;
    if (subleaf == 0) {
        *ebx &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* AVX512 F … VL */
        *ecx &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)); /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        *edx &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* AVX512 rest, FP16, AMX */
    } else if (subleaf == 1) {
        *eax &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));   /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
        *edx &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19));   /* AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16, AVX10 */
    }
}

static void on_fault(int signal_number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const uint8_t *at = (const uint8_t *)registers[REG_RIP];
    if (info->si_code == SI_KERNEL && at[0] == 0x0F && at[1] == 0xA2) {
        uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX], a, b, c, d;
        cpuid_enabled(1);
        __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(subleaf));
        cpuid_enabled(0);
        hide(leaf, subleaf, &a, &b, &c, &d);
        registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
        registers[REG_RIP] += 2;
        return;
    }
    if ((others.sa_flags & SA_SIGINFO) && others.sa_sigaction) {
        others.sa_sigaction(signal_number, info, context);
    } else if (others.sa_handler != SIG_DFL && others.sa_handler != SIG_IGN) {
        others.sa_handler(signal_number);
    } else {
        struct sigaction none;
        memset(&none, 0, sizeof none);
        next_sigaction(SIGSEGV, &none, NULL); /* the instruction runs again, and ends the process */
    }
}

static void find_next(void) {
    if (!next_sigaction) next_sigaction = dlsym(RTLD_NEXT, "sigaction");
}

/* A handler that the program sets (Python's faulthandler does) is kept behind ours. */
int sigaction(int signal_number, const struct sigaction *act, struct sigaction *old) {
    find_next();
    if (signal_number != SIGSEGV) return next_sigaction(signal_number, act, old);
    if (old) *old = others;
    if (act) others = *act;
    return 0;
}

typedef void (*handler)(int);

/* glibc's signal() does not go through the symbol above. */
handler signal(int signal_number, handler to) {
    struct sigaction act, old;
    memset(&act, 0, sizeof act);
    act.sa_handler = to;
    act.sa_flags = SA_RESTART;
    return sigaction(signal_number, &act, &old) ? SIG_ERR : old.sa_handler;
}

/* A thread that blocks SIGSEGV would be killed by its next CPUID. */
static int set_mask(const char *name, int how, const sigset_t *set, sigset_t *old) {
    int (*next)(int, const sigset_t *, sigset_t *) = (int (*)(int, const sigset_t *, sigset_t *))dlsym(RTLD_NEXT, name);
    sigset_t without;
    if (!set || how == SIG_UNBLOCK) return next(how, set, old);
    without = *set;
    sigdelset(&without, SIGSEGV);
    return next(how, &without, old);
}

int pthread_sigmask(int how, const sigset_t *set, sigset_t *old) { return set_mask("pthread_sigmask", how, set, old); }

int sigprocmask(int how, const sigset_t *set, sigset_t *old) { return set_mask("sigprocmask", how, set, old); }

__attribute__((constructor)) static void start(void) {
    struct sigaction own;
    memset(&own, 0, sizeof own);
    own.sa_sigaction = on_fault;
    own.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    find_next();
    next_sigaction(SIGSEGV, &own, &others);
    if (cpuid_enabled(0)) {
        static const char text[] = "hide_vnni: this machine has no CPUID faulting\n";
        if (write(2, text, sizeof text - 1)) {}
        _exit(75);
    }
}
