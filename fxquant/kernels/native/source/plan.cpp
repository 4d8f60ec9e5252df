// A plan is an array of steps. All threads go through it together: each takes units of a step while there are any, and waits
// for the others before the next step.
#include <atomic>
#include <thread>

#include "attention.h"
#include "layout.h"
#include "winograd.h"

namespace fxquant {

static void compute(const Step& s, int unit, const Finish& finish, int thread) {
    switch (s.kind) {
        case QUANTIZE: return quantize(s, unit);
        case CONVOLUTION: return convolution(s, unit, finish);
        case WINOGRAD: return winograd(s, unit, finish, thread);
        case WINOGRAD_INPUT: return winograd_input(s, unit);
        case DEPTHWISE: return depthwise(s, unit, finish);
        case DEPTHWISE_THREE: return depthwise_three(s, unit, finish);
        case ATTENTION: return attend(s, unit);
        case SOFTMAX: return softmax(s, unit);
        case LAYER_NORM: return normalize(s, unit);
        case MAXIMUM: return maximum(s, unit);
        case AVERAGE: return average(s, unit);
        case TABLE: return look_up(s, unit);
        case ADD: return add(s, unit);
        case MULTIPLY: return multiply(s, unit);
        case AFFINE: return affine(s, unit);
        case COPY: return copy(s, unit);
        case DEQUANTIZE: return dequantize(s, unit);
    }
}

// How far a step is. Each thread has a share of the units, that of the same part of every tensor, so that it finds in its own
// cache what it wrote there; then it takes what is left of the others' shares. A thread goes on when all units are done, so
// that any number of threads may come, at any time.
struct alignas(64) Count {
    std::atomic<int> value{0};
};

struct Run {
    const Step* steps;
    int count, threads;
    Count* done;   // [step]
    Count* taken;  // [step][thread]
    std::atomic<int> arrived{0};
};

static void work(void* data) {
    Run& run = *static_cast<Run*>(data);
    const int self = run.arrived.fetch_add(1, std::memory_order_relaxed) % run.threads;
    for (int i = 0; i < run.count; i++) {
        const Step& s = run.steps[i];
        std::atomic<int>& done = run.done[i].value;
        if (done.load(std::memory_order_relaxed) < s.units) {
            const Finish finish(s);
            int computed = 0;
            for (int k = 0; k < run.threads; k++) {
                const int owner = (self + k) % run.threads;
                const int from = static_cast<int>(static_cast<int64_t>(s.units) * owner / run.threads);
                const int end = static_cast<int>(static_cast<int64_t>(s.units) * (owner + 1) / run.threads);
                std::atomic<int>& taken = run.taken[i * run.threads + owner].value;
                for (int unit; (unit = from + taken.fetch_add(1, std::memory_order_relaxed)) < end; computed++)
                    compute(s, unit, finish, self);
            }
            if (computed) done.fetch_add(computed, std::memory_order_release);
        }
        for (int spins = 0; done.load(std::memory_order_acquire) < s.units; spins++) {
            if (spins < 4000) pause();
            else std::this_thread::yield();
        }
    }
}

}  // namespace fxquant

extern "C" {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

const fxquant::Entry* fxquant_layout() { return fxquant::LAYOUT; }
int fxquant_layout_count() { return static_cast<int>(sizeof(fxquant::LAYOUT) / sizeof(fxquant::Entry)); }

int fxquant_runs_here() { return fxquant::runs_here(); }

// How weights are laid out for this instruction set: bytes of a weight, whether a layer may have bytes whose products are added
// in pairs instead, what is taken off a pixel's bytes, and blocks of 16 channels beside each other.
int fxquant_weight_size() { return static_cast<int>(sizeof(fxquant::Weight)); }
int fxquant_pairs_of_bytes() { return fxquant::PAIRS_OF_BYTES; }
int fxquant_centre() { return fxquant::CENTRE; }
int fxquant_blocks_together() { return fxquant::BLOCKS_TOGETHER; }

// parallel: GOMP_parallel of the OpenMP that torch runs on, or null for threads of our own.
void fxquant_run(const fxquant::Step* steps, int count, int threads, Parallel parallel) {
    if (threads < 1) threads = 1;
    std::vector<fxquant::Count> counts(static_cast<size_t>(count) * (threads + 1));
    fxquant::Run run{steps, count, threads, counts.data(), counts.data() + count};
    if (threads <= 1) {
        fxquant::work(&run);
    } else if (parallel) {
        parallel(fxquant::work, &run, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int i = 1; i < threads; i++) others.emplace_back(fxquant::work, &run);
        fxquant::work(&run);
        for (auto& t : others) t.join();
    }
}
}
