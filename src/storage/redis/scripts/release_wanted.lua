-- Somebody stands in the queue.
if not ours then
  leave(ARGV[1])
  return 0
end
if ARGV[2] then stand(ARGV[2], ARGV[3], ARGV[4], ARGV[5]) end
local ttl, seconds, micros = pass_on(ARGV[2])
if not ttl then
  -- All others were gone.
  redis.call('DEL', KEYS[1], KEYS[2])
  return 1
end
if ARGV[2] then return { ttl, seconds, micros } end
return 1
