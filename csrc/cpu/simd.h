// SIMD that adapts to the machine: one source, compiled for each level of x86-64 and chosen when the library is loaded.
// -march=native would crash on another machine. Clones need ifunc (GNU/Linux); sanitizers cannot run ifunc resolvers.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(__SANITIZE_ADDRESS__) && !defined(MIXUPE_NO_CLONES)
#define MIXUPE_HAS_CLONES
#define MIXUPE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// Machines of the highest level that also round to bfloat16 by themselves: a level GCC 12 has no clones for.
#define MIXUPE_SIMD_BFLOAT16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#else
#define MIXUPE_SIMD
#endif
