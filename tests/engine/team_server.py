"""A team's engine in a process of its own, whose passes take what they are said to: for measurements.

The real service, engine thread, scheduler and slots; the model's passes sleep. The tokens of its users are in
the argument; it says its address on stdout, and ends when its stdin does.
"""

import asyncio
import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from paced import PacedRunner, paced_engine

from midfill.engine.remote.server.listen import ListenSpec, raise_file_limit, serve
from midfill.engine.remote.server.model_host import ModelHost


class RealTime:
    """In the place of `clock.Clock`."""

    def spend(self, seconds):
        time.sleep(seconds)

    def takes_part(self):
        pass


async def main(tokens, step_s):
    def make():
        runner = PacedRunner(RealTime(), step_s, 0.1 * step_s, 0.035 * step_s, 64)
        # The steps are of one part: a hundred short sleeps are not what they are said to be.
        runner.num_parts = 1
        return paced_engine(runner)

    def end():
        host.on_exit()  # which is `serve`'s by then

    loop = asyncio.get_running_loop()
    host = ModelHost(make, vocabulary="bytes")
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(end)), daemon=True).start()
    raise_file_limit()
    await serve(host, ListenSpec(tokens=tokens), lambda address: print(address, flush=True))


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1]), float(sys.argv[2])))
