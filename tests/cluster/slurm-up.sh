#!/bin/bash
# A throwaway Slurm on loopback: a CPU node (c1) and two GPU nodes (g1 with two fake GPUs, g2 with one), each a slurmd of this machine.
#   slurm-up.sh FOLDER     root only; packages: slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins
# No systemd, no cgroups, no accounting; ports 17817 and 17901-17903 on 127.0.0.1. slurm-down.sh FOLDER undoes it.
set -euo pipefail
folder=${1:?usage: slurm-up.sh FOLDER}
mkdir -p "$folder"/{state,log,dev} "$folder"/spool/{c1,g1,g2}

# A fake GPU is a device file that nothing opens (the null device): Slurm hands out its number.
for n in 0 1 2; do [ -e "$folder/dev/fakegpu$n" ] || mknod "$folder/dev/fakegpu$n" c 1 3; done

if ! munge -n >/dev/null 2>&1; then
  mkdir -p /run/munge && chown munge: /run/munge && chmod 755 /run/munge
  [ -s /etc/munge/munge.key ] || runuser -u munge -- mungekey
  runuser -u munge -- munged
  touch "$folder/munged.ours"
fi

# cred_expire: a requeued job waits that long before it starts again (120 s by default).
cat > "$folder/slurm.conf" <<CONF
ClusterName=stagebench
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=17817
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
MinJobAge=600
SlurmdTimeout=6
KillWait=5
JobRequeue=0
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
GresTypes=gpu
NodeName=c1 NodeAddr=127.0.0.1 NodeHostname=localhost Port=17901 CPUs=4 RealMemory=8000
NodeName=g1 NodeAddr=127.0.0.1 NodeHostname=localhost Port=17902 CPUs=4 RealMemory=8000 Gres=gpu:fake:2
NodeName=g2 NodeAddr=127.0.0.1 NodeHostname=localhost Port=17903 CPUs=4 RealMemory=8000 Gres=gpu:fake:1
PartitionName=cpu Nodes=c1 Default=YES MaxTime=1440 State=UP
PartitionName=gpu Nodes=g1,g2 MaxTime=1440 State=UP
CONF
cat > "$folder/gres.conf" <<CONF
AutoDetect=off
NodeName=g1 Name=gpu Type=fake File=$folder/dev/fakegpu[0-1]
NodeName=g2 Name=gpu Type=fake File=$folder/dev/fakegpu2
CONF
echo "CgroupAutomount=no" > "$folder/cgroup.conf"

# The step inside a job drops SLURM_CONF, so the configuration must be where Slurm was compiled to look for it.
mkdir -p /etc/slurm
for file in slurm.conf gres.conf cgroup.conf; do
  if [ -e "/etc/slurm/$file" ] && [ ! -L "/etc/slurm/$file" ]; then
    echo "/etc/slurm/$file is there already: this machine has a Slurm of its own. Run this on another one." >&2
    exit 3
  fi
  ln -sfn "$folder/$file" "/etc/slurm/$file"
done

slurmctld -c
for node in c1 g1 g2; do slurmd -N "$node"; done
for _ in $(seq 150); do
  [ "$(sinfo -h -N -t idle -o %N 2>/dev/null | sort -u | wc -l)" = 3 ] && exit 0
  sleep 0.1
done
sinfo -N -o "%N %t %E" >&2
tail -n 5 "$folder"/log/*.log >&2
exit 4
