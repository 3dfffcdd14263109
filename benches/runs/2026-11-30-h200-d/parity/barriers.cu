#include <cstdio>
__device__ void sync_(int id,int n){asm volatile("bar.sync %0, %1;"::"r"(id),"r"(n):"memory");}
__device__ void arrive_(int id,int n){asm volatile("bar.arrive %0, %1;"::"r"(id),"r"(n):"memory");}
enum {A,B,C,D,E,F,G};
template<int V> __device__ void meet(int warp){
  int part=warp%4,group=part/2,share=warp/4;
  if(V==A){ if(share) arrive_(1+part,64); else sync_(1+part,64); }
  if(V==B){ if(share){ if(part==0)arrive_(1,64); else if(part==1)arrive_(2,64); else if(part==2)arrive_(3,64); else arrive_(4,64);} else { if(part==0)sync_(1,64); else if(part==1)sync_(2,64); else if(part==2)sync_(3,64); else sync_(4,64);} }
  if(V==C) sync_(1+part,64);
  if(V==D){ if(share) arrive_(1,256); else sync_(1,256); }
  if(V==E){ if(share) arrive_(1+group,128); else sync_(1+group,128); }
  if(V==F){ if(group==0){ if(share) arrive_(1,128); else sync_(1,128);} else { if(share) arrive_(2,128); else sync_(2,128);} }
  if(V==G){ if(part==0)sync_(1,64); else if(part==1)sync_(2,64); else if(part==2)sync_(3,64); else sync_(4,64); }
}
template<int V> __global__ void k(float* o){
  __shared__ float s[256],h[128],z[128]; float a=0; int t=threadIdx.x,w=t/32;
  for(int i=0;i<4;++i){
    s[t]=t+i; __syncthreads(); a+=s[255-t];
    if(w>=4) h[t-128]=a; meet<V>(w); if(w<4) z[t]=a+h[t];
    __syncthreads(); a+=z[(t+5)%128];
    __syncthreads();
  }
  o[t]=a;
}
int main(){ float*o; cudaMalloc(&o,4096); k<A><<<1,256>>>(o);k<B><<<1,256>>>(o);k<C><<<1,256>>>(o);k<D><<<1,256>>>(o);k<E><<<1,256>>>(o);k<F><<<1,256>>>(o);k<G><<<1,256>>>(o); printf("%s\n",cudaGetErrorString(cudaDeviceSynchronize())); }
