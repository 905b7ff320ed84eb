"""Everything a person runs.

Read in this order; each program stands after what it is made of.
    arguments    what the words of the command line stand for, and shell completion.
    rendering    how results leave the command line.
    frame        what all commands share.
    tools        the commands exec and write.
    doctor/      the checks of `outlive doctor`.
    screen/      what a process's terminal shows, from its transcript.
    units        the text of a systemd unit, and why each setting is there.
    installation installing the broker as a systemd unit, and taking it out again.
    views        the commands that look, and change nothing.
    waiting      the commands about rules: wait and watch.
    orders       the commands that change something.
    doors/       agents that know nothing of outlive: `outlive mcp` and `outlive tool`, a sandbox of the Agents SDK.
    cli          `outlive`, the command line.
    examples/    agents to start from.

    home         an OUTLIVE_HOME for one run of the next three programs, emptied and removed at its end.
    demo         the main job on real input, told as a story; checks each of its claims.
    flood        a child that floods numbered lines, and what must then be in its transcript.
    compare      the Agents SDK's local sandbox and ours, when the application is killed.
    mayhem/      what chaos is made of: children whose truth is known, deaths at chosen moments, the accounts.
    chaos        random deaths under flood; prints what was lost, which must be nothing.
    baselines    what outlive is compared with: a C reader, a bare spawn, a bare descriptor.
    measurement  what a measurement is given, and the lines of the result.
    flooded      measures drain, and calls, under flood.
    latency      measures how long a caller waits.
    footprint    measures memory and wake-ups.
    bench        all measurements, as ratios against the baselines: a table, or JSON.

The files without an ending set everything up and then run the module of the same name; `setup`, `test` and
`check` are for developers.
"""
