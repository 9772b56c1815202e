# Builds the chosen variants into cubin/. Names: d_ dense, g_ grouped, w_ weight gradient, m_ at the speed of memory.
# Needs python3 with nvidia-cuda-nvrtc, and nvdisasm on the PATH for the last line.
set -e
cd "$(dirname "$0")"
rm -rf cubin
Z="-DGROUPED=0"; G="-DGROUPED=1"; C1="-DMATH=2,-DBM=256,-DBN=128,-DSTAGES=3"
python3 build.py fp8_gemm.cu d_256x128:$C1,-DAHEAD=1,-DBAND=8,$Z d_256x128_short:$C1,-DAHEAD=1,-DBAND=16,$Z \
  d_128x176:-DMATH=2,-DBM=128,-DBN=176,-DSTAGES=4,-DAHEAD=0,-DBAND=4,$Z \
  g_256x128:$C1,-DAHEAD=1,-DBAND=4,$G
python3 build.py fp8_wgrad.cu w_128x128:-DMATH=2,-DBN=128,-DSTAGES=4,-DBAND=8
for f in quantise swiglu norm permute turn gate read; do python3 build.py $f.cu m_$f:; done
python3 build.py ../../tests/peers/hopper/copy.cu m_copy:
python3 banks.py cubin/[dgw]_*.cubin
