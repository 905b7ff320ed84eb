"""Everything a person runs.

    cli      `outlive`, the command line; its header names the modules that it is made of.
    demo     the main job on real input, told as a story; checks each of its claims.
    home     an OUTLIVE_HOME for one run of the next two, emptied and removed at its end.
    flood    a child that floods numbered lines, and what must then be in its transcript.
    chaos    random deaths under flood; prints what was lost, which must be nothing.
    bench    speed and memory, as ratios against baselines measured in the same run.

The files without an ending set everything up and then run the module of the same name; `setup`, `test` and
`check` are for developers.
"""
