"""The list of steps, with the seconds after which each is killed.

Times on an H200 with 16 cores, estimated and not measured: in the first groups all steps run in parallel and
mostly compile, about 400 kernels of 0.3 to 3 s each on one core (`triton.compile` for 9.0, an EPYC). The longest
step has 40 s of them; with slower cores and 15 processes that start together, 90 s. Steps that run alone: tiles
60 s, the site of a method 30 s, the others 60 s. The total is about six and a half minutes of the eight.
"""

from functools import partial

from benchmarks.gpu import attention, blocks, clusters, prediction, replays, sites, speed
from benchmarks.gpu.inputs import DTYPES, named
from benchmarks.gpu.runner import CORRECT, SITES, SPEED, Step

STEPS = (
    # The longest first: they run in parallel.
    *(
        Step(name=f"{way} {named(dtype)}", function=partial(function, dtype), seconds=180, group=CORRECT)
        for way, function in (("backward", attention.backward_cases), ("forward", attention.forward_cases))
        for dtype in DTYPES
    ),
    Step(name="tiles", function=attention.candidate_cases, seconds=120, group=CORRECT),
    Step(name="blocks", function=blocks.cases, seconds=120, group=CORRECT),
    Step(name="clusters", function=clusters.cases, seconds=120, group=CORRECT),
    Step(name="prediction", function=prediction.cases, seconds=120, group=CORRECT),
    *(
        Step(name=f"site {name}", function=partial(sites.cases, name), seconds=200, group=SITES)
        for name in sites.METHODS
    ),
    Step(name="replays", function=replays.cases, seconds=200, group=SITES),
    Step(name="speed tiles", function=speed.tile_cases, seconds=150, group=SPEED),
    *(
        Step(name=f"speed {name}", function=partial(speed.site_cases, name), seconds=90, group=SPEED)
        for name in sites.METHODS
    ),
    Step(name="speed others", function=speed.other_cases, seconds=150, group=SPEED),
)
