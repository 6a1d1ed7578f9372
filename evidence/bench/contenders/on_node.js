// Node's net module. `node on_node.js WORKLOAD`

"use strict";
const net = require("net");

const CHUNK = Buffer.from(Array.from({ length: 65536 }, (_, i) => i % 256));

const WORKLOADS = {
  fin: (socket) => socket.once("data", (data) => socket.end(data)),

  // Written to the kernel when the callback comes; before that it would be discarded.
  rst: (socket) =>
    socket.once("data", (data) => socket.write(data, () => socket.resetAndDestroy())),

  echo: (socket) => socket.pipe(socket),

  download: (socket) =>
    socket.once("data", (data) => {
      let left = Number(data);
      const send = () => {
        while (left > 0) {
          const chunk = CHUNK.subarray(0, left);
          left -= chunk.length;
          if (!socket.write(chunk)) {
            socket.once("drain", send);
            return;
          }
        }
        socket.end();
      };
      send();
    }),
};

const sockets = new Set(); // for the reset of all
const handler = WORKLOADS[process.argv[2]];
const server = net.createServer({ noDelay: true }, (socket) => {
  sockets.add(socket);
  socket.on("close", () => sockets.delete(socket));
  socket.on("error", () => {});
  handler(socket);
});

server.listen({ host: "127.0.0.1", port: 0, backlog: 4096 }, () => {
  console.log(server.address().port);
});

const command = () => {
  console.log(Number(process.hrtime.bigint()) / 1e9);
  for (const socket of sockets) socket.resetAndDestroy();
  server.close();
  process.stdin.destroy();
};
process.stdin.once("data", command).once("end", command);
