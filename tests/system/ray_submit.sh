#!/usr/bin/env bash
# `ray up` and `ray submit` by ssh to this machine: cluster.local.yaml, end to end. Needs root, and port 22 free.
#
#     PYTHON=.venv/bin/python bash tests/system/ray_submit.sh            # three small updates
#     PYTHON=.venv/bin/python bash tests/system/ray_submit.sh --whole    # all of configs/digits.yaml
#
# Installs Debian's openssh-server and rsync if they are missing, and leaves them. All else is in a folder that goes at
# the end: sshd on 127.0.0.1 with throwaway keys, and, as the home folder of its sessions, an empty one. Only processes
# of that folder are ended. What it derives from cluster.local.yaml (tests/system/derive.py): an environment that is
# already there in place of the set-up by pip, free ports in place of Ray's, no `ray stop`. So none of the three is
# tested here, nor `ray down`, which calls `ray stop`.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
bin=$(dirname "$python")
work=$(mktemp -d -t rlr_submit.XXXX)
name=$(basename "$work")
home=$work/home client=$work/client

clean_up() {
    status=$?
    for process in /proc/[0-9]*; do
        if grep -qzsx "RAY_TMPDIR=$work" "$process/environ"; then kill -9 "${process#/proc/}" 2> /dev/null || true; fi
    done
    if test -f "$work/sshd.pid"; then kill "$(cat "$work/sshd.pid")"; fi
    if test -n "${made_run_sshd:-}"; then rmdir /run/sshd; fi
    # Ray's launcher keeps its ssh sockets under /tmp, whatever TMPDIR says
    rm -rf "$work" /tmp/ray_ssh_*/"$(printf %s "$name" | sha256sum | cut -c 1-10)"
    exit $status
}
trap clean_up EXIT

# As a user would, but with the throwaway folders for ~ and /tmp; the output without this machine's paths.
show() {
    echo "\$ ${*//$work/<temporary>}"
    env HOME="$client" RAY_TMPDIR="$work" TMPDIR="$work" RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1 TERM=dumb \
        PATH="$bin:$PATH" "$@" 2>&1 | sed -u -e "s#$home#~#g; s#$client#~#g; s#$work#<temporary>#g; s#$PWD#.#g; s#$bin#<bin>#g"
}

if ! test -x /usr/sbin/sshd || ! command -v rsync > /dev/null; then
    apt-get update -q > /dev/null && apt-get install -yq openssh-server rsync > /dev/null
fi
mkdir -p "$home" "$client"
test -d /run/sshd || { mkdir /run/sshd && made_run_sshd=yes; }
ssh-keygen -q -t ed25519 -N '' -f "$work/host_key"
ssh-keygen -q -t ed25519 -N '' -f "$work/key"
cat > "$work/sshd_config" << END
Port 22
ListenAddress 127.0.0.1
HostKey $work/host_key
AuthorizedKeysFile $work/key.pub
PidFile $work/sshd.pid
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
SetEnv HOME=$home RAY_TMPDIR=$work TMPDIR=$work
END
/usr/sbin/sshd -f "$work/sshd_config" -E "$work/sshd.log"
"$python" tests/system/derive.py cluster.local.yaml "$work" "$bin" > "$work/cluster.local.yaml"

show ray get-auth-token --generate > /dev/null
show ray up --yes --log-style pretty --log-color false "$work/cluster.local.yaml"
smaller=(--set train.iterations=3 --set train.chains=40 --set estimator.zeroth_order.count=40
    --set evaluation.chains=20 --set evaluation.pictures=4)
if test "${1:-}" = --whole; then smaller=(); fi
show ray submit --log-style pretty --log-color false "$work/cluster.local.yaml" train.py -- --config configs/digits.yaml \
    ${smaller[@]+"${smaller[@]}"}
"$python" - "$home/runs/digits/summary.json" << 'END'
import json, sys

summary = json.load(open(sys.argv[1]))
print("summary.json:", {key: summary[key] for key in ("gain", "ran_on")})
assert "TorchTrainer" in summary["ran_on"] and "rollout actors" in summary["ran_on"]
END
