#!/bin/bash
# A job under PBS Pro or OpenPBS: qsub -v JOB=job.yaml docker/templates/pbs.sh
#
# No PBS was at hand: the tests run this file by bash, with the node file and the signal of PBS (tests/integration/test_templates.py).
#PBS -N hvdlarge
#PBS -l select=2:ncpus=32:mpiprocs=4:ngpus=4
#PBS -l walltime=04:00:00
#PBS -r y
#PBS -j oe
# PBS ends a job at its limit by SIGTERM and, after the server's kill_delay (10 s by default), SIGKILL. So the run stops itself with a checkpoint
# before that, by the job's own clock: `stop_after_minutes`, here five minutes before the limit. It then ends with 75 and is submitted again.
# After qdel, which sends SIGTERM too, it is not.
set -u
cd "$PBS_O_WORKDIR" || exit 3
python=${HVDLARGE_PYTHON:-python}
minutes=${STOP_AFTER_MINUTES:-235}
hosts=$(mktemp)
sort "$PBS_NODEFILE" | uniq -c | awk '{print $2 ":" $1}' > "$hosts"
"$python" -m hvdlarge.launch -np "$(wc -l < "$PBS_NODEFILE")" --hosts-file "$hosts" "$JOB" stop_after_minutes="$minutes" &
launcher=$!
ended_from_outside=no
trap 'ended_from_outside=yes; kill -TERM $launcher' TERM

# A trapped signal ends `wait` early, so it is called until the launcher has ended.
wait $launcher
code=$?
while kill -0 $launcher 2>/dev/null; do
    wait $launcher
    code=$?
done
rm -f "$hosts"
if [ $code = 75 ] && [ $ended_from_outside = no ]; then
    echo "pbs.sh: stopped with a checkpoint; the job is submitted again"
    qsub -v JOB="$JOB" "$0"
fi
exit $code
