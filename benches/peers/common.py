"""What the scripts of this folder share: options, timing, and tables."""
import argparse, json, os, shlex, statistics, subprocess, sys, time, warnings

warnings.filterwarnings("ignore")

COLD_BYTES = 1 << 30


def options(shapes, **more):
    """Parses the command line; `more` are further options that take words."""
    args = argparse.ArgumentParser()
    args.add_argument("lowbit")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--threads", type=int, default=1)
    args.add_argument("--shapes", nargs="*", default=shapes)
    args.add_argument("--peer", action="append", default=[])
    for name, default in more.items():
        args.add_argument(f"--{name}", nargs="*", default=default)
    args = args.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # before anything heavy is imported
    return args


def timed(calls, least=10, seconds=1.0):
    """(min, median) of calls in turn, each made once before anything counts."""
    for call in calls:
        call()
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        call = calls[len(times) % len(calls)]
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
        if time.perf_counter() - start > 5 * seconds:
            break
    return min(times), statistics.median(times)


def run(command):
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(line)
    return report["min_s"], report["median_s"]


def ours(args, *choice):
    """`lowbit bench gemm` with these options."""
    def measure(m, n, k, cold):
        command = [args.lowbit, "bench", "gemm", "--json", *choice]
        command += ["--threads", str(args.threads), "--m", str(m), "--n", str(n), "--k", str(k)]
        return run(command + ["--cold"] * cold)
    return measure


def others(args):
    """The peers of the command line."""
    def command(text):
        return lambda m, n, k, cold: run(shlex.split(text) + [str(m), str(n), str(k), str(int(cold))])
    return {name: command(text) for name, _, text in (peer.partition("=") for peer in args.peer)}


def tables(args, contenders):
    """Measures all contenders in turn, round by round, and prints a table for each shape."""
    for shape in args.shapes:
        m, n, k, *cold = shape.split(",")
        m, n, k = int(m), int(n), int(k)
        times = {name: [] for name in contenders}
        for _ in range(args.rounds):
            for name, measure in contenders.items():
                try:
                    times[name].append(measure(m, n, k, bool(cold)))
                except Exception as error:
                    print(f"{name}, {shape}: {error}", file=sys.stderr)
        print(f"\n| {m} x {n} x {k}{', from memory' if cold else ''} | least | median | at the least |\n|---|---|---|---|")
        for name, results in times.items():
            if results:
                least, median = (min(column) for column in zip(*results))
                rate = f"{1e6 * least:.0f} us" if m == 1 else f"{2 * m * n * k / least / 1e9:.0f} Gop/s"
                print(f"| {name} | {least * 1e3:.3f} ms | {median * 1e3:.3f} ms | {rate} |", flush=True)
