#!/bin/bash
# Stops what slurm-up.sh started, by its pid files, waits for each to be gone, and takes its configuration out of /etc/slurm.
folder=${1:?usage: slurm-down.sh FOLDER}

# Whether a process runs: one that has ended and that nobody has waited for yet does not.
alive() { grep -q '^State:[[:space:]]*[^Z[:space:]]' "/proc/$1/status" 2>/dev/null; }

# After five seconds it is killed: nothing of it is kept.
stop() {
  [ -s "$1" ] || return 0
  local pid
  pid=$(cat "$1")
  kill "$pid" 2>/dev/null || return 0
  for _ in $(seq 50); do alive "$pid" || return 0; sleep 0.1; done
  kill -9 "$pid" 2>/dev/null
}

for job in $(timeout 5 squeue -h -o %A 2>/dev/null); do timeout 5 scancel --signal=KILL "$job" 2>/dev/null; done
for node in c1 g1 g2; do stop "$folder/slurmd.$node.pid"; done
stop "$folder/slurmctld.pid"
# munged wipes its socket as it ends, so a start that does not wait for that would lose it
[ -e "$folder/munged.ours" ] && stop /run/munge/munged.pid
for file in slurm.conf gres.conf cgroup.conf; do
  [ "$(readlink "/etc/slurm/$file")" = "$folder/$file" ] && rm -f "/etc/slurm/$file"
done
exit 0
