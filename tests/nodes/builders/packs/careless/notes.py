"""What the nodes note while they run, for tests to wait for."""

import os

EVENT_FILE = os.environ.get("CARELESS_EVENTS")


def note(what):
    if EVENT_FILE:
        with open(EVENT_FILE, "a") as file:
            file.write(f"{what}\n")
