#!/usr/bin/env bash
# What a container of hvdlarge starts.
#
#   hvdlarge-entrypoint sshd               an ssh server, for the ranks that an mpirun elsewhere starts here
#   hvdlarge-entrypoint COMMAND ARGUMENT…  waits until every other host of the hostfile answers on its ssh port, then runs the command
#
#   OMPI_MCA_orte_default_hostfile         the hostfile, as the Kubernetes MPI operator sets it; without it nothing is waited for
#   HVDLARGE_HOSTS_SECONDS                 how long to wait for the hosts, all together (default: 300)
#   HVDLARGE_SSH_PORT                      of the server, and of the connections that mpirun makes (default: 2222)
#
# Exit code: that of the command; 1 if a host does not answer in time, or nothing can be started (one message says why).
set -euo pipefail

die() { printf 'hvdlarge-entrypoint: error: %s\n' "$*" >&2; exit 1; }

# shellcheck disable=SC2016  # the inner bash puts them in
answers() { timeout 5 bash -c 'exec 3<> "/dev/tcp/$1/$2"' answers "$1" "$port" 2> /dev/null; }

serve() {
    local folder=$HOME/.hvdlarge-sshd
    [ -r "$HOME/.ssh/authorized_keys" ] || die "there is no $HOME/.ssh/authorized_keys: mount a folder with it, else nobody can log in"
    mkdir -p "$folder"
    [ -f "$folder/host_key" ] || ssh-keygen -q -t ed25519 -N '' -f "$folder/host_key"
    # A session does not get the environment of the server; without this PATH a remote `python` would be the system's.
    exec /usr/sbin/sshd -D -e -f /etc/hvdlarge/sshd_config -o "HostKey=$folder/host_key" -o "SetEnv=PATH=$PATH" -p "$port"
}

wait_for_hosts() {
    local hostfile=$1 host hosts here missing pids said='' deadline=$((SECONDS + seconds))
    [ -r "$hostfile" ] || die "there is no hostfile $hostfile"
    # The first word of a line, without the number of slots that may follow a colon.
    mapfile -t hosts < <(awk '{ sub(/#.*/, "") } NF { sub(/:.*/, "", $1); print $1 }' "$hostfile" | sort -u)
    [ ${#hosts[@]} -gt 0 ] || die "the hostfile $hostfile names no host"
    # mpirun starts the ranks of its own host without ssh.
    here=$(uname -n)
    missing=()
    for host in "${hosts[@]}"; do
        [ "${host%%.*}" = "${here%%.*}" ] || [ "$host" = localhost ] || missing+=("$host")
    done
    # The first process of a container ignores signals that it does not ask for.
    trap 'exit 143' TERM INT
    while [ ${#missing[@]} -gt 0 ]; do
        hosts=("${missing[@]}") pids=() missing=()
        for host in "${hosts[@]}"; do
            answers "$host" &
            pids+=($!)
        done
        for host in "${!hosts[@]}"; do wait "${pids[host]}" || missing+=("${hosts[host]}"); done
        [ ${#missing[@]} -gt 0 ] || break
        [ $SECONDS -lt $deadline ] || die "no answer on port $port after $seconds s from: ${missing[*]}"
        [ -n "$said" ] || printf 'hvdlarge-entrypoint: waiting at most %s s for: %s\n' "$seconds" "${missing[*]}" >&2
        said=yes
        sleep 1
    done
    trap - TERM INT
}

port=${HVDLARGE_SSH_PORT:-2222}
seconds=${HVDLARGE_HOSTS_SECONDS:-300}
[ $# -gt 0 ] || die "no command; try: hvdlarge doctor"
case $port$seconds in *[!0-9]*) die "HVDLARGE_SSH_PORT=$port and HVDLARGE_HOSTS_SECONDS=$seconds must be whole numbers" ;; esac
[ "$1" != sshd ] || serve
# The ssh of the image has port 2222 in its settings.
[ "$port" = 2222 ] || export OMPI_MCA_plm_rsh_args="${OMPI_MCA_plm_rsh_args:-} -p $port"
hostfile=${OMPI_MCA_orte_default_hostfile:-}
[ -z "$hostfile" ] || wait_for_hosts "$hostfile"
exec "$@"
