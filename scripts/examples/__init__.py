"""Agents to start from; each is one file that says how to try it.

babysitter      waits for a slow test run, reads what failed, and runs that again: a function
babysitter.sh   the same, as a command in a shell
suite.sh        the test run
outlived_agent  an agent of OpenAI's Agents SDK whose REPL outlives the application
"""
