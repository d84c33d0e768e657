#!/usr/bin/env bash
# A job on several hosts without a scheduler: mpirun with a hostfile.
#
#   docker/templates/hostfile.sh HOSTFILE job.yaml [KEY=VALUE…]
#
# HOSTFILE has a line for each host: `name slots=4`, with as many slots as the host has GPUs (or cores). Every host needs the same environment
# under the same path, and ssh from here without a password (docs/resume-and-launch.md).
# After the loss of a host take it out of HOSTFILE, and run the same command to go on with the others.
# To stop with a checkpoint: kill -USR1 the mpirun (exit code 75). SIGTERM kills the ranks after a second; `hvdlarge launch` turns it into a stop.
set -eu
hosts=$1
shift
workers=$(awk '!/^[[:space:]]*(#|$)/ {n = 1; for (i = 2; i <= NF; i++) if ($i ~ /^slots=/) n = substr($i, 7); sum += n} END {print sum + 0}' "$hosts")
[ "$workers" -gt 0 ] || { echo "hostfile.sh: $hosts has no slots" >&2; exit 2; }

# On hosts with several networks name the one that they share, for MPI and for NCCL:
#   export OMPI_MCA_btl_tcp_if_include=eth0 OMPI_MCA_oob_tcp_if_include=eth0 NCCL_SOCKET_IFNAME=eth0
exec mpirun -np "$workers" --hostfile "$hosts" --bind-to none -x PATH -x LD_LIBRARY_PATH \
    "${HVDLARGE_PYTHON:-python}" -m hvdlarge.train "$@"
