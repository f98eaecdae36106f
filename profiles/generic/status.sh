#!/bin/sh
# running, success or failed, for the id of a job that Slurm knows. Write your scheduler's own.
case "$(squeue --noheader --states=all --format=%T --jobs="$1" 2>/dev/null || sacct --noheader --parsable2 --allocations --format=State --jobs="$1")" in
  COMPLETED*) echo success ;;
  BOOT_FAIL* | CANCELLED* | DEADLINE* | FAILED* | NODE_FAIL* | OUT_OF_MEMORY* | TIMEOUT*) echo failed ;;
  *) echo running ;;
esac
