#!/usr/bin/env bash
# What a container of hvdlarge starts.
#
#   hvdlarge-entrypoint sshd               an ssh server on port 2222, for the ranks that an mpirun elsewhere starts here
#   hvdlarge-entrypoint COMMAND ARGUMENT…  waits until every host of the hostfile answers on its ssh port, then runs the command
#
#   OMPI_MCA_orte_default_hostfile         the hostfile, as the Kubernetes MPI operator sets it; without it nothing is waited for
#   HVDLARGE_HOSTS_SECONDS                 how long to wait for the hosts, all together (default: 300)
#   HVDLARGE_SSH_PORT                      default: 2222
set -euo pipefail

die() { printf 'hvdlarge-entrypoint: error: %s\n' "$*" >&2; exit 1; }

answers() { timeout 5 bash -c "exec 3<>/dev/tcp/$1/$port" 2>/dev/null; }

serve() {
    local folder=$HOME/.hvdlarge-sshd
    mkdir -p "$folder"
    [ -f "$folder/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$folder/host_key"
    exec /usr/sbin/sshd -D -e -f /etc/hvdlarge/sshd_config -o "HostKey=$folder/host_key" -p "$port"
}

wait_for_hosts() {
    local hostfile=$1 host hosts missing deadline=$((SECONDS + seconds))
    [ -r "$hostfile" ] || die "there is no hostfile $hostfile"
    # The first word of a line, without the number of slots that may follow a colon.
    mapfile -t hosts < <(awk 'NF { sub(/#.*/, "") } NF { sub(/:.*/, "", $1); print $1 }' "$hostfile")
    [ ${#hosts[@]} -gt 0 ] || die "the hostfile $hostfile names no host"
    while true; do
        missing=()
        for host in "${hosts[@]}"; do answers "$host" || missing+=("$host"); done
        [ ${#missing[@]} -gt 0 ] || return 0
        [ $SECONDS -lt $deadline ] || die "no answer on port $port after $seconds s from: ${missing[*]}"
        sleep 1
    done
}

port=${HVDLARGE_SSH_PORT:-2222}
seconds=${HVDLARGE_HOSTS_SECONDS:-300}
[ $# -gt 0 ] || die "no command; try: hvdlarge doctor"
[ "$1" != sshd ] || serve
hostfile=${OMPI_MCA_orte_default_hostfile:-}
[ -z "$hostfile" ] || wait_for_hosts "$hostfile"
exec "$@"
