#!/usr/bin/env bash
# A job in Apptainer (Singularity): mpirun of the host starts a container for each worker, with the same major version of Open MPI inside and outside.
# Not run here: no Apptainer was at hand.
#
#   apptainer build hvdlarge.sif docker-daemon://hvdlarge:gpu
#   docker/templates/apptainer.sh 8 job.yaml [KEY=VALUE…]            # within an allocation, or on one host
#   srun --mpi=pmix apptainer exec --nv hvdlarge.sif python -m hvdlarge.train job.yaml       # under Slurm
set -eu
workers=$1
shift
exec mpirun -np "$workers" --bind-to none apptainer exec --nv "${SIF:-hvdlarge.sif}" python -m hvdlarge.train "$@"
