// AVX-VNNI's dot product by its twin of AVX512-VNNI, which does the same in another encoding: for processors that have that alone.
#include <immintrin.h>
#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32
