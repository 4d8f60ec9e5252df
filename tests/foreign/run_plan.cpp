// Computes a plan that another process has made, on any processor: reads the memory that the plan knows, lays each block out on
// its own, turns its pointers to where that is now, computes the steps, and writes all blocks. plan_memory.py is the other end.
//
//     run_plan about    the layout of the structures and what this set wants of weights, a name and numbers a line
//     run_plan          a plan from standard input, its memory to standard output
#include <cstdio>
#include <cstdlib>

#include "plan.cpp"

namespace {

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "run_plan: %s\n", what);
    std::exit(3);
}

void about() {
    for (int i = 0; i < fxquant_layout_count(); i++) {
        const fxquant::Entry& e = fxquant_layout()[i];
        std::printf("%s %lld %lld %c\n", e.name, static_cast<long long>(e.at), static_cast<long long>(e.size), e.kind);
    }
    std::printf("runs_here %d\nweight_size %d\npairs_of_bytes %d\nblocks_together %d\ncentre %d\n", fxquant_runs_here(),
                fxquant_weight_size(), fxquant_pairs_of_bytes(), fxquant_blocks_together(), fxquant_centre());
}

// Memory of the other process: in ascending order, none in another.
struct Block {
    uint64_t address, size;
    uint8_t* here;
};

struct Blocks {
    std::vector<Block> all;

    uint8_t* find(uint64_t address) const {
        auto after = std::upper_bound(all.begin(), all.end(), address, [](uint64_t a, const Block& b) { return a < b.address; });
        check(after != all.begin(), "a pointer lies before all memory");
        const Block& block = *--after;
        check(address < block.address + block.size, "a pointer lies in no memory");
        return block.here + (address - block.address);
    }
};

template <class T>
std::vector<T> read(size_t count) {
    std::vector<T> found(count);
    check(std::fread(found.data(), sizeof(T), count, stdin) == count, "standard input ends early");
    return found;
}

// As far from a multiple of 64 as there, and with nothing behind: a sanitizer sees one byte too many.
void lay_out(Block& block) {
    const uint64_t before = block.address % 64;
    void* memory = nullptr;
    check(posix_memalign(&memory, 64, before + block.size) == 0, "no memory is left");
    block.here = static_cast<uint8_t*>(memory) + before;
    check(std::fread(block.here, 1, block.size, stdin) == block.size, "standard input ends early");
}

void compute() {
    const std::vector<uint64_t> head = read<uint64_t>(5);  // numbers of blocks and of pointers, steps: where, how many; threads
    Blocks blocks;
    for (uint64_t i = 0; i < head[0]; i++) {
        const std::vector<uint64_t> one = read<uint64_t>(2);
        blocks.all.push_back({one[0], one[1], nullptr});
    }
    const std::vector<uint64_t> pointers = read<uint64_t>(head[1]);
    for (Block& block : blocks.all) lay_out(block);
    for (uint64_t place : pointers) {
        uint64_t there;
        uint8_t* at = blocks.find(place);
        std::memcpy(&there, at, 8);
        const uint8_t* here = blocks.find(there);
        std::memcpy(at, &here, 8);
    }
    fxquant_run(reinterpret_cast<const fxquant::Step*>(blocks.find(head[2])), static_cast<int>(head[3]), static_cast<int>(head[4]), nullptr);
    for (const Block& block : blocks.all) check(std::fwrite(block.here, 1, block.size, stdout) == block.size, "writing failed");
    for (const Block& block : blocks.all) std::free(block.here - block.address % 64);
}

}  // namespace

int main(int count, char**) {
    check(fxquant::runs_here() || count > 1, "this processor lacks the set");
    count > 1 ? about() : compute();
}
