"""`python -m benchmarks.gpu --out DIR`: all measurements of the Triton kernels on one GPU, in eight minutes.

    runner     runs the list of steps, each in a worker process with a time limit; records each result as it comes
    steps      the list
    device     the GPU, or on a machine without a GPU the CPU (`--dry-run`)
    report     the records as short tables

The steps, correctness first:

    attention, blocks, clusters, prediction    every kernel, in every type, against float64 sites
    every method, Triton next to the reference; no synchronisation; graphs speed
    tiles at video size next to cuDNN and flash, sites, backward
"""
