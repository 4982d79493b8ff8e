# Runs the named kernel benchmarks one after the other, each within its time; output of each to $OUT.
for name in "$@"; do
  begun=$(date +%s)
  SWEEP=${SWEEP:-1} timeout ${LIMIT:-85} python3 -m benchmarks.kernels.$name > $OUT/$name.txt 2>&1
  echo "$name: exit $? after $(( $(date +%s) - begun )) s"
done
