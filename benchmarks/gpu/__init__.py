"""`python -m benchmarks.gpu --out DIR`: all that is to be known of the Triton kernels on one GPU, in eight minutes.

    runner     the list of steps, each a process of its own with a time limit; what came of each, as it comes
    steps      the list
    device     the GPU, or on a machine without one the CPU in its place (`--dry-run`)
    report     the records as short tables

What the steps do, correctness first:

    attention, blocks, clusters, prediction    every kernel, in every type, against float64
    sites                                      every method, Triton beside the reference; no synchronisation; graphs
    speed                                      tiles at video size beside cuDNN and flash, sites, backward
"""
