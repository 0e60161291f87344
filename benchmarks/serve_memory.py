"""Memory of a server over many requests: `dream-hf serve` with the bundled pair, asked by several clients at once.

    python benchmarks/serve_memory.py --output benchmarks/results/serve_memory.json

Every tenth request is broken off in mid-answer, as a reader does who goes away. Needs the extra `serve` and the package
`openai`; reads resident memory from /proc, so Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from platforms import describe_platform

from dream_hf.demo import TASKS
from dream_hf.demo.pictures import bundled_picture

PATIENCE = 180  # seconds until the server must answer


def main() -> None:
    options = parse_options()
    from openai import OpenAI  # here, so that `--help` works without it

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dream_hf", "serve", "--target", "demo", "--drafter", "demo", "--device", "cpu"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([*command, "--port", str(port)], **quiet)
    try:
        wait_for(f"http://localhost:{port}/v1/models", server)
        client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0, timeout=600)
        samples = ask(client, server.pid, options)
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(timeout=60)
    result = {
        "settings": {"requests": options.requests, "clients": options.clients},
        "platform": describe_platform("cpu"),
        "exit_code": code,
        "resident_mb": samples,
        "growth_mb": growth(samples),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=200, help="default: 200")
    parser.add_argument("--clients", type=int, default=8, help="asking at once (default: 8)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Until the server answers there."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urlopen(url, timeout=PATIENCE).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def ask(client: Any, pid: int, options: argparse.Namespace) -> list[float]:
    """Resident MB of the server behind every round of requests, one of each client."""
    samples = []
    with ThreadPoolExecutor(options.clients) as clients:
        for first in range(0, options.requests, options.clients):
            numbers = range(first, min(first + options.clients, options.requests))
            list(clients.map(lambda number: ask_once(client, number), numbers))
            samples.append(resident_mb(pid))
    return samples


def ask_once(client: Any, number: int) -> None:
    """One request about one of the bundled pictures, streamed; every tenth is broken off."""
    picture, question = bundled_picture(list(TASKS)[number % len(TASKS)])
    url = "data:image/png;base64," + b64encode(Path(picture).read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    stream = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=200, stream=True
    )
    for chunk in stream:
        if number % 10 == 9 and chunk.choices and chunk.choices[0].delta.content:
            stream.close()
            return


def resident_mb(pid: int) -> float:
    """Memory that a process has in RAM."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def growth(samples: list[float]) -> float:
    """MB from the mean of the second quarter of the samples to that of the last one; the first one warms up."""
    quarter = max(1, len(samples) // 4)
    return round(sum(samples[-quarter:]) / quarter - sum(samples[quarter : 2 * quarter]) / quarter, 1)


if __name__ == "__main__":
    main()
