"""The whole job in miniature on a CPU: `bash tools/demo.sh`."""
