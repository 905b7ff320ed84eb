"""Wake rules on real processes: found wherever these are held, while the thread sleeps, and over every death.

What came true is seen through `wait_until`, and for the rules of a thread through a broker of the test's own making
of `on_match`: the events that it publishes.
"""
